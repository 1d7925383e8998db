"""Logits that exist where a bias by distance is added by the kernel of plain matrix products.

That kernel takes some query rows at a time. The Triton kernel, which serves such a bias on a GPU
where the tokens of a sequence are together, makes no logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from longnet_zoo.ops.schedule import Block, blocks_of

from .network import Network

__all__ = ["Call", "block_calls", "part_calls", "whole_calls"]

# What the kernel takes at a time, and `joint_softmax` of rows on a CPU.
_MAX_LOGITS = 2**22
_MIN_ROWS = 64
_CALL_ROWS = 2**13
_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the kernel.

    Attributes:
        batch: Segments.
        rows: Query rows.
        keys: Key rows.
        heads: Heads.
        is_causal: Whether a query sees no later key.
    """

    batch: int
    rows: int
    keys: int
    heads: int
    is_causal: bool

    def peak_bytes(self, head_dim: int, item_size: int) -> int:
        """Most of what a backward call makes for itself, its results left out."""
        size = max(_MIN_ROWS, _MAX_LOGITS // (self.batch * self.heads * self.keys))
        most = before = 0
        for start in range(0, self.rows, size)[-3:]:  # causal chunks grow
            stop = min(start + size, self.rows)
            pairs = (stop - start) * (stop if self.is_causal else self.keys)
            bias = pairs * self.heads * _FLOAT32
            logits = self.batch * bias
            # Logits, weights and gradients of the chunk before are there until they are made anew.
            most = max(
                most,
                3 * before + logits + bias + pairs * _INT64,
                2 * before + 3 * logits,
                3 * logits + bias + pairs * _INT64,
            )
            before = logits
        numbers = self.keys  # a product, before it is added to the gradient of the keys
        if item_size < _FLOAT32:
            numbers += 3 * self.rows + 2 * self.keys  # what it is given, as float32
        return most + self.batch * self.heads * head_dim * _FLOAT32 * numbers


def whole_calls(network: Network, seq_len: int, *, num_heads: int | None = None) -> list[Call]:
    """Lists the calls for sequences whose tokens are together; `num_heads` of all heads."""
    heads = network.num_heads if num_heads is None else num_heads
    # A part of the heads has its own keys.
    kv_heads = network.num_kv_heads if num_heads is None else heads
    blocks = blocks_of(network.pattern, seq_len, heads, kv_heads, network.is_causal)
    return [_call(block, block.num_rows, network.is_causal) for block in blocks]


def part_calls(network: Network, seq_len: int, num_ranks: int) -> list[Call]:
    """Lists calls of dilated attention where ranks share a sequence: of the ends and the middle."""
    length = -(-seq_len // num_ranks)
    last = (seq_len - 1) // length  # ranks beyond have padding only
    calls = []
    for part in {0, last // 2, max(0, last - 1), last}:
        blocks = blocks_of(
            network.pattern,
            seq_len,
            network.num_heads,
            network.num_kv_heads,
            network.is_causal,
            start=part * length,
            length=min(length, seq_len - part * length),
        )
        for block in blocks:
            calls.append(_call(block, block.num_rows, network.is_causal))
            others = (block.num_before, block.num_after)
            calls += [_call(block, keys, False) for keys in others if keys]
    return calls


def block_calls(network: Network, rows: int) -> list[Call]:
    """Lists the largest call of ring attention, of tiles of some rows."""
    shared = network.num_heads // network.num_kv_heads
    heads = shared if shared > 1 else network.num_heads
    return [Call(batch=1, rows=rows, keys=rows, heads=heads, is_causal=False)]


def _call(block: Block, keys: int, is_causal: bool) -> Call:
    return Call(
        batch=min(block.num_segments, max(1, _CALL_ROWS // block.num_rows)),
        rows=block.num_rows,
        keys=keys,
        heads=block.num_heads,
        is_causal=is_causal,
    )
