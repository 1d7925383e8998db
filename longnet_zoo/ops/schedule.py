"""A pattern turned into blocks: groups of rows and heads that one kernel call can attend.

Everything here is integers. A `Block` describes strided views, so that no row is gathered:

    row(s, t, u)  = row_start + s * segment_stride + t * row_step + u * head_skew
    head(u)       = head_start + u * head_step

with segment s, row t and head u. `head_skew` = 1 puts the heads h, h + 1, h + 2, ... of a branch,
whose offsets differ by one, into a single call although they use different rows.

Shape legend: b batch, n seq_len, h heads, s segments, t rows of a segment, u heads of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from torch import Tensor

from .pattern import DilatedPattern

__all__ = ["Block", "blocks_of", "view_pairs", "view_rows"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows and heads of one branch that attend to each other, segment by segment."""

    branch: int
    num_segments: int
    segment_stride: int
    row_start: int
    num_rows: int
    row_step: int
    head_start: int
    num_heads: int
    head_step: int
    head_skew: int
    kv_head_start: int
    kv_head_step: int
    num_zero_keys: int

    @property
    def heads(self) -> slice:
        """The query heads of the block."""
        stop = self.head_start + self.num_heads * self.head_step
        return slice(self.head_start, stop, self.head_step)


@lru_cache(maxsize=1024)
def blocks_of(
    pattern: DilatedPattern, seq_len: int, num_heads: int, num_kv_heads: int, is_causal: bool
) -> tuple[Block, ...]:
    """Lists the blocks of a sequence, branches in the order of the pattern."""
    return tuple(
        block
        for branch in range(len(pattern.branches))
        for block in _branch_blocks(
            pattern, branch, seq_len, num_heads, num_heads // num_kv_heads, is_causal
        )
    )


def _branch_blocks(
    pattern: DilatedPattern,
    branch: int,
    seq_len: int,
    num_heads: int,
    group_size: int,
    is_causal: bool,
) -> Iterator[Block]:
    segment_length, rate = pattern.branches[branch]
    segment_length = min(segment_length, seq_len)
    num_full, tail = divmod(seq_len, segment_length)
    offsets = pattern.offsets(branch, num_heads)
    zeros_count = pattern.padded_keys == "zero" and not is_causal
    for start, length, num_segments in (
        (0, segment_length, num_full),
        (num_full * segment_length, tail, 1),
    ):
        for heads in _head_groups(offsets, length, rate, group_size):
            first = heads[0]
            second = heads[min(1, len(heads) - 1)]
            num_rows = len(range(offsets[first], length, rate))
            yield Block(
                branch=branch,
                num_segments=num_segments,
                segment_stride=segment_length,
                row_start=start + offsets[first],
                num_rows=num_rows,
                row_step=rate,
                head_start=first,
                num_heads=len(heads),
                head_step=max(1, second - first),
                head_skew=offsets[second] - offsets[first],
                kv_head_start=first // group_size,
                kv_head_step=second // group_size - first // group_size,
                num_zero_keys=-(-segment_length // rate) - num_rows if zeros_count else 0,
            )


def _head_groups(
    offsets: tuple[int, ...], length: int, rate: int, group_size: int
) -> list[list[int]]:
    """Splits the heads into few groups, each an arithmetic progression with equal row counts.

    Heads of equal offset form one, and so do neighbouring heads whose offsets rise by one; what
    gives fewer calls depends on the number of heads per offset.
    """
    present = [head for head, offset in enumerate(offsets) if offset < length]

    def num_rows(head: int) -> int:
        return len(range(offsets[head], length, rate))

    by_offset = [
        run
        for offset in sorted({offsets[head] for head in present})
        for run in _progressions([h for h in present if offsets[h] == offset], offsets, group_size)
    ]
    by_neighbour = [
        run
        for _, heads in groupby(present, key=num_rows)
        for run in _progressions(list(heads), offsets, group_size)
    ]
    return min(by_offset, by_neighbour, key=len)


def _progressions(
    heads: list[int], offsets: tuple[int, ...], group_size: int
) -> Iterator[list[int]]:
    """Cuts heads into the longest runs in which head, offset and key head each step evenly."""
    while heads:
        size = 1

        def step(index: int, heads: list[int] = heads) -> tuple[int, int, int]:
            a, b = heads[index - 1], heads[index]
            return b - a, offsets[b] - offsets[a], b // group_size - a // group_size

        while size < len(heads) and step(size) == step(1) and step(size)[1] >= 0:
            size += 1
        yield heads[:size]
        heads = heads[size:]


def view_rows(x: Tensor, block: Block, *, is_kv: bool = False) -> Tensor:
    """The block's rows of a tensor (b, n, h, ...) as a strided view (b, s, t, u, ...).

    Key heads that several query heads share are repeated with stride zero.
    """
    batch, row, head, *rest = x.stride()
    head_start = block.kv_head_start if is_kv else block.head_start
    head_step = block.kv_head_step if is_kv else block.head_step
    return x.as_strided(
        (x.shape[0], block.num_segments, block.num_rows, block.num_heads, *x.shape[3:]),
        (
            batch,
            block.segment_stride * row,
            block.row_step * row,
            head_step * head + block.head_skew * row,
            *rest,
        ),
        x.storage_offset() + block.row_start * row + head_start * head,
    )


def view_pairs(bias: Tensor, block: Block) -> Tensor:
    """The block's (query, key) pairs of a tensor (b, h, n, n) as a strided view (b, s, u, t, t)."""
    batch, head, query, key = bias.stride()
    pair = query + key
    return bias.as_strided(
        (bias.shape[0], block.num_segments, block.num_heads, block.num_rows, block.num_rows),
        (
            batch,
            block.segment_stride * pair,
            block.head_step * head + block.head_skew * pair,
            block.row_step * query,
            block.row_step * key,
        ),
        bias.storage_offset() + block.row_start * pair + block.head_start * head,
    )
