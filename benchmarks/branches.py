"""Branches beyond dilation: their speed against dense attention, and what of its weights they keep.

Speed: causal attention of one sequence by block masks of a density, by subsets of queries and keys,
and by hash buckets, in turn with dense attention, and with dense attention that gets the mask. The
queries and keys are random, so that tokens fill the buckets about evenly.

Recall: each query is a noisy copy of one key far back, which dense attention finds. At about equal
attended pairs, how much of the dense softmax falls on keys that a branch shows, and how many of the
planted keys are among them. Patterns that are fixed beforehand can only hit by chance.

    python -m benchmarks.branches --device cpu --output benchmarks/results/branches-cpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.branch_recall import measure_recall
from benchmarks.contenders import FLOPS, PASSES, passes_of
from benchmarks.measure import (
    DTYPES,
    alternate,
    at_least_1,
    choose_device,
    largest_excess,
    make_parser,
    peak_extra_mib,
    timing_ms,
)
from benchmarks.record import Cell, Record, run_programme
from longnet_zoo.bench import make_progress
from longnet_zoo.ops import BlockSparse, HashBuckets, TokenSubset, dilated_attention
from longnet_zoo.ops.branches import ExtraBranch
from longnet_zoo.ops.reference import dilated_attention_reference
from longnet_zoo.ops.seeded import hash_labels

DENSE, MASKED = "dense", "dense, given the mask"
_CHECKED_LEN = 200


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size: causal attention of one sequence."""

    seq_len: int
    num_heads: int
    head_dim: int
    block_size: int
    dtype: str
    device: torch.device

    def draw(self) -> Tensor:
        """A random tensor (1, seq_len, num_heads, head_dim)."""
        shape = (1, self.seq_len, self.num_heads, self.head_dim)
        return torch.randn(shape, device=self.device, dtype=DTYPES[self.dtype][0])

    def block_mask(self, density: float) -> Tensor:
        """Random blocks and the diagonal, (blocks, blocks)."""
        num_blocks = -(-self.seq_len // self.block_size)
        mask = torch.rand(num_blocks, num_blocks, device=self.device) < density
        return mask | torch.eye(num_blocks, dtype=torch.bool, device=self.device)

    def kept(self, share: float) -> Tensor:
        """Random tokens of each head, (1, seq_len, num_heads)."""
        return torch.rand((1, self.seq_len, self.num_heads), device=self.device) < share


def main(options: argparse.Namespace) -> int:
    """Runs every size; returns 1 if a branch was wrong."""
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = ("seq_lens", "recall_len", "num_heads", "head_dim", "block_size", "rounds")
    settings = {name: getattr(options, name) for name in names}
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    settings |= {"dtype": dtype, "max_mask_len": options.max_mask_len}
    record = Record(
        "branches", settings, device=device, output=options.output, resume=options.resume
    )
    sizes = [
        Size(
            seq_len=seq_len,
            num_heads=options.num_heads,
            head_dim=options.head_dim,
            block_size=options.block_size,
            dtype=dtype,
            device=device,
        )
        for seq_len in (_CHECKED_LEN, *options.seq_lens)
    ]
    problem = check(sizes[0])
    if problem:
        print(f"not timed: {problem}")
        return 1
    for size in sizes[1:]:
        if record.find(part="speed", seq_len=size.seq_len) is None:
            record.add(measure_speed(size, options.rounds, options.max_mask_len))
    if record.find(part="recall") is None:
        cells = measure_recall(options.recall_len, options.num_heads, options.head_dim, device)
        for cell in cells:
            print(
                f"{cell['branches']:44}{cell['keys_per_query']:8.1f} keys a query"
                f"{cell['mass']:8.3f} of the weights{cell['planted']:8.3f} of the planted keys"
            )
        record.add(cells)
    record.complete()
    return 0


def branches_of(size: Size) -> dict[str, ExtraBranch]:
    """The branches to be measured, by name."""
    found: dict[str, ExtraBranch] = {}
    for denominator in (4, 8, 16, 32):
        found[f"blocks, 1/{denominator} of them"] = BlockSparse(
            block_mask=size.block_mask(1 / denominator), block_size=size.block_size
        )
    for percent in (75, 50, 25):
        share = percent / 100
        found[f"{percent} % of queries and keys"] = TokenSubset(
            queries=size.kept(share), keys=size.kept(share)
        )
    for num_buckets in (16, 64):
        found[f"{num_buckets} hash buckets"] = HashBuckets(num_buckets=num_buckets)
    return found


def check(size: Size) -> str | None:
    """Says which branch is off from the float64 oracle at a small size, or None."""
    for name, branch in branches_of(size).items():
        leaves = [size.draw().requires_grad_() for _ in range(3)]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        out_grad = size.draw()
        out = attend(*leaves, branch=branch)
        expected = dilated_attention_reference(
            *exact, None, is_causal=True, extra_branches=(branch,)
        )
        found = [out, *torch.autograd.grad(out, leaves, out_grad)]
        right = [expected, *torch.autograd.grad(expected, exact, out_grad.double())]
        for what, x, y in zip(("output", "dq", "dk", "dv"), found, right, strict=True):
            excess = largest_excess(x, y, size.dtype)
            if not excess <= 1:
                return f"wrong: {what} of {name} is off by {excess:.3g} times the tolerance"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, *, branch: ExtraBranch) -> Tensor:
    """Causal attention by one branch alone."""
    out: Tensor = dilated_attention(q, k, v, None, is_causal=True, extra_branches=(branch,))
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention, causal or by a mask that is added to the logits."""
    rows = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(*rows, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)


def measure_speed(size: Size, rounds: int, max_mask_len: int) -> list[Cell]:
    """Times every branch in turn with dense attention."""
    q, k, v, out_grad = (size.draw() for _ in range(4))
    branches = branches_of(size)
    all_pairs = size.num_heads * size.seq_len * (size.seq_len + 1) // 2
    pairs = {DENSE: all_pairs}
    attends: dict[str, Callable[..., Tensor]] = {DENSE: dense}
    if size.seq_len <= max_mask_len:
        attends[MASKED] = partial(dense, mask=added_mask(size, branches["blocks, 1/16 of them"]))
        pairs[MASKED] = all_pairs
    for name, branch in branches.items():
        attends[name] = partial(attend, branch=branch)
        pairs[name] = count_pairs(branch, q, k)
    runs = {name: passes_of(run, (q, k, v, out_grad)) for name, run in attends.items()}
    peaks = {
        (name, passed): peak_extra_mib(run)
        for name, passes in runs.items()
        for passed, run in passes.items()
    }
    flat = {f"{name}, {x}": run for name, passes in runs.items() for x, run in passes.items()}
    with make_progress() as progress:
        title = f"{size.seq_len:,} tokens"
        task = progress.add_task(title, total=len(flat) * (rounds + 1))
        timings = alternate(flat, rounds=rounds, on_run=lambda _: progress.update(task, advance=1))
    cells = []
    for name in runs:
        cell: Cell = {"part": "speed", "seq_len": size.seq_len, "contender": name}
        cell["pairs"] = pairs[name]
        for passed in PASSES:
            timing = timings[f"{name}, {passed}"]
            flops = FLOPS[passed] * size.head_dim * pairs[name]
            cell[passed] = {
                **timing_ms(timing),
                "peak_extra_mib": peaks[name, passed],
                "gflops_per_s": flops / timing.median_s / 1e9,
                "ratios": {
                    f"speed_over_{key}": timings[f"{other}, {passed}"].median_s / timing.median_s
                    for key, other in (("dense", DENSE), ("masked", MASKED))
                    if other in runs
                },
            }
        cells.append(cell)
    show_table(title, cells)
    return cells


def added_mask(size: Size, branch: ExtraBranch) -> Tensor:
    """What dense attention adds to its logits to see what a block mask shows, (n, n)."""
    assert isinstance(branch, BlockSparse)
    blocks = torch.arange(size.seq_len, device=size.device) // branch.block_size
    seen = branch.block_mask[blocks[:, None], blocks].tril()
    dtype = DTYPES[size.dtype][0]
    return torch.zeros(seen.shape, dtype=dtype, device=size.device).masked_fill_(
        ~seen, float("-inf")
    )


def count_pairs(branch: ExtraBranch, q: Tensor, k: Tensor) -> int:
    """Counts the (query, key) pairs of all heads."""
    seq_len, num_heads = q.shape[1:3]
    if isinstance(branch, BlockSparse):
        return branch.attended_pairs(seq_len, num_heads, is_causal=True)
    if isinstance(branch, TokenSubset):
        assert branch.queries is not None
        assert branch.keys is not None
        labels = [x.long() for x in (branch.queries, branch.keys)]
        buckets = [1]
    else:
        assert isinstance(branch, HashBuckets)
        options = {"num_kv_heads": num_heads, "num_buckets": branch.num_buckets}
        labels = [hash_labels(x, **options, num_rounds=1, seed=branch.seed)[0] for x in (q, k)]
        buckets = list(range(branch.num_buckets))
    counts = [((labels[1] == x).cumsum(1) * (labels[0] == x)).sum() for x in buckets]
    return int(torch.stack(counts).sum())


def show_table(title: str, cells: list[Cell]) -> None:
    """Prints one line for each contender and pass."""
    print(f"\n{title:44}{'ms':>10}{'GFLOP/s':>10}{'MiB':>8}{'vs dense':>10}{'vs masked':>10}")
    for passed in PASSES:
        for cell in cells:
            figures, ratios = cell[passed], cell[passed]["ratios"]
            masked = f"{ratios['speed_over_masked']:.2f}" if "speed_over_masked" in ratios else "-"
            print(
                f"{passed:18}{cell['contender']:26}{figures['median_ms']:10.1f}"
                f"{figures['gflops_per_s']:10.1f}{figures['peak_extra_mib']:8.0f}"
                f"{ratios['speed_over_dense']:10.2f}{masked:>10}",
                flush=True,
            )


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--seq-lens", type=at_least_1, nargs="+", default=[4096, 8192, 16384], help="tokens"
    )
    parser.add_argument("--recall-len", type=at_least_1, default=8192, help="tokens")
    parser.add_argument("--num-heads", type=at_least_1, default=4)
    parser.add_argument("--head-dim", type=at_least_1, default=64)
    parser.add_argument("--block-size", type=at_least_1, default=128, help="tokens per block")
    parser.add_argument(
        "--max-mask-len",
        type=at_least_1,
        default=8192,
        help="tokens up to which dense attention gets a mask of all pairs",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
