"""What share of dense attention the branches show, where content decides; see `branches.py`.

Shape legend: n seq_len, h num_heads, d head_dim, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.record import Cell
from longnet_zoo.ops import BigBirdBlocks, DilatedPattern, HashBuckets
from longnet_zoo.ops.seeded import hash_labels

__all__ = ["measure_recall", "plant"]

# A query is this many times a key with this much noise: the logit of the planted key stands out of
# those of all others by far more than their spread.
_STRENGTH, _NOISE = 1.5, 0.3
_ROWS = 256
_NUM_BUCKETS = 32

# Rows (c,) -> which keys they see, (h, c, n), causality aside.
Sees = Callable[[Tensor], Tensor]


def measure_recall(seq_len: int, num_heads: int, head_dim: int, device: torch.device) -> list[Cell]:
    """One cell for each way to spend about the pairs of one round of hash buckets."""
    q, k, planted = plant(seq_len, num_heads, head_dim, device)
    budget = 0.75 * seq_len / _NUM_BUCKETS  # keys before a query of the second half, on average
    ways: dict[str, Sees] = {
        "dilated": _dilated(seq_len, num_heads, budget),
        "blocks: window, global, random": _blocks(seq_len, num_heads, budget),
        f"1 round of {_NUM_BUCKETS} hash buckets": _hashed(q, k, _NUM_BUCKETS, 1),
        f"2 rounds of {2 * _NUM_BUCKETS} hash buckets": _hashed(q, k, 2 * _NUM_BUCKETS, 2),
        f"dilated at half, 1 round of {2 * _NUM_BUCKETS} hash buckets": _union(
            _dilated(seq_len, num_heads, budget / 2), _hashed(q, k, 2 * _NUM_BUCKETS, 1)
        ),
    }
    sums = {name: torch.zeros(3, dtype=torch.float64, device=device) for name in ways}
    first = seq_len // 2  # earlier queries have nothing planted
    for rows, weights in _dense_weights(q, k, first):
        is_past = torch.arange(seq_len, device=device) <= rows[:, None]
        for name, sees in ways.items():
            seen = sees(rows) & is_past
            hits = seen.gather(2, planted[rows].T.unsqueeze(2))
            found = [(weights * seen).sum(), hits.sum(), seen.sum()]
            sums[name] += torch.stack([x.double() for x in found])
    num_queries = num_heads * (seq_len - first)
    return [
        {
            "part": "recall",
            "seq_len": seq_len,
            "branches": name,
            "mass": float(total[0] / num_queries),
            "planted": float(total[1] / num_queries),
            "keys_per_query": float(total[2] / num_queries),
        }
        for name, total in sums.items()
    ]


def plant(
    seq_len: int, num_heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws queries and keys, (n, h, d), and the key that each query of the second half copies.

    That key, (n, h), is a random one of the first quarter.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (seq_len, num_heads, head_dim)
    q, k, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    planted = torch.randint(max(1, seq_len // 4), shape[:2], generator=generator).to(device)
    copies = k.gather(0, planted.unsqueeze(2).expand(shape))
    second = slice(seq_len // 2, None)
    q[second] = _STRENGTH * (copies + _NOISE * noise)[second]
    return q, k, planted


def _dense_weights(q: Tensor, k: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (c,) from `first` on, with their causal softmax, (h, c, n)."""
    order = torch.arange(len(q), device=q.device)
    for rows in order[first:].split(_ROWS):
        logits = torch.einsum("chd,nhd->hcn", q[rows], k) / q.shape[2] ** 0.5
        yield rows, logits.masked_fill_(order > rows[:, None], float("-inf")).softmax(-1)


def _dilated(seq_len: int, num_heads: int, budget: float) -> Sees:
    """The paper's kind of pattern, up to the whole sequence, nearest to a budget of pairs."""
    patterns = []
    powers = range(seq_len.bit_length())
    for shortest in (step * 2**power for power in powers for step in (4, 5, 6)):
        rates = [2**power for power in range((seq_len // shortest).bit_length() + 1)]
        lengths = tuple(shortest * rate for rate in rates)
        pattern = DilatedPattern(segment_lengths=lengths, dilation_rates=tuple(rates))
        pairs = pattern.attended_pairs(seq_len, num_heads, is_causal=True)
        patterns.append((abs(pairs / num_heads / seq_len - budget), pattern))
    pattern = min(patterns, key=lambda found: found[0])[1]
    order = torch.arange(seq_len)

    def sees(rows: Tensor) -> Tensor:
        seen = torch.zeros(num_heads, len(rows), seq_len, dtype=torch.bool, device=rows.device)
        for branch, (length, rate) in enumerate(pattern.branches):
            keys = order.to(rows.device)
            offsets = torch.tensor(pattern.offsets(branch, num_heads), device=rows.device)
            is_used = keys % min(length, seq_len) % rate == offsets[:, None]
            same = rows[:, None] // length == keys // length
            seen |= is_used[:, rows, None] & is_used[:, None] & same
        return seen

    return sees


def _blocks(seq_len: int, num_heads: int, budget: float) -> Sees:
    """Window, global and random blocks, with as many random ones as fit into a budget of pairs."""
    size = 32
    rules = [BigBirdBlocks(block_size=size, num_random=number) for number in range(64)]
    pairs = [rule.attended_pairs(seq_len, 1, is_causal=True) / seq_len for rule in rules]
    best = min(range(len(rules)), key=lambda number: abs(pairs[number] - budget))
    mask = rules[best].for_length(seq_len).block_mask

    def sees(rows: Tensor) -> Tensor:
        keys = torch.arange(seq_len, device=rows.device) // size
        seen = mask.to(rows.device)[rows[:, None] // size, keys]
        return seen.expand(num_heads, -1, -1)

    return sees


def _hashed(q: Tensor, k: Tensor, num_buckets: int, num_rounds: int) -> Sees:
    branch = HashBuckets(num_buckets=num_buckets, num_rounds=num_rounds)
    options = {"num_buckets": branch.num_buckets, "num_rounds": branch.num_rounds}
    query_labels, key_labels = (
        hash_labels(x[None], num_kv_heads=q.shape[1], seed=branch.seed, **options)[:, 0].mT
        for x in (q, k)
    )

    def sees(rows: Tensor) -> Tensor:
        return (query_labels[:, :, rows, None] == key_labels[:, :, None]).any(0)

    return sees


def _union(one: Sees, other: Sees) -> Sees:
    return lambda rows: one(rows) | other(rows)
