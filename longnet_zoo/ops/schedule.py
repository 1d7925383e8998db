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
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from torch import Tensor

from .pattern import DilatedPattern

__all__ = ["Block", "blocks_of", "view_pairs", "view_rows"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows and heads of one branch that attend to each other, segment by segment.

    A segment of which only a part is there, since other processes have the rest, has rows before
    and after those of the block: the t-th row of the block is row `num_before + t` of the segment.
    """

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
    num_before: int = 0
    num_after: int = 0

    @property
    def heads(self) -> slice:
        """The query heads of the block."""
        stop = self.head_start + self.num_heads * self.head_step
        return slice(self.head_start, stop, self.head_step)

    @property
    def is_kv_shared(self) -> bool:
        """Whether all heads of the block read the same rows of one key head."""
        return self.kv_head_step == self.head_skew == 0

    @property
    def segment_rows(self) -> int:
        """Rows that the whole segment has in each head."""
        return self.num_before + self.num_rows + self.num_after


@lru_cache(maxsize=1024)
def blocks_of(
    pattern: DilatedPattern,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
    *,
    start: int = 0,
    length: int | None = None,
) -> tuple[Block, ...]:
    """Lists the blocks of a sequence, or of a part of one, branches in the order of the pattern.

    Args:
        pattern: The schedule.
        seq_len: Tokens of the whole sequence.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        is_causal: Whether a query sees no later key; rows after a part are then left out.
        start: First token of the part.
        length: Tokens of the part; None: all from `start` on.
    """
    part = range(start, seq_len if length is None else start + length)
    return tuple(
        block
        for branch in range(len(pattern.branches))
        for block in _branch_blocks(
            pattern, branch, seq_len, part, num_heads, num_heads // num_kv_heads, is_causal
        )
    )


def _branch_blocks(
    pattern: DilatedPattern,
    branch: int,
    seq_len: int,
    part: range,
    num_heads: int,
    group_size: int,
    is_causal: bool,
) -> Iterator[Block]:
    segment_length, rate = pattern.branches[branch]
    segment_length = min(segment_length, seq_len)
    offsets = pattern.offsets(branch, num_heads)
    has_zero_keys = pattern.padded_keys == "zero" and not is_causal
    for segment, own, num_segments in _segments(segment_length, seq_len, part):
        rows = [_rows_of(segment, own, offset, rate) for offset in offsets]
        if is_causal:
            rows = [replace(row, num_after=0) for row in rows]
        for heads in _head_groups(rows, group_size):
            first = heads[0]
            second = heads[min(1, len(heads) - 1)]
            block = Block(
                branch=branch,
                num_segments=num_segments,
                segment_stride=segment_length,
                row_start=rows[first].first - part.start,
                num_rows=rows[first].num_own,
                row_step=rate,
                head_start=first,
                num_heads=len(heads),
                head_step=max(1, second - first),
                head_skew=rows[second].first - rows[first].first,
                kv_head_start=first // group_size,
                kv_head_step=second // group_size - first // group_size,
                num_zero_keys=0,
                num_before=rows[first].num_before,
                num_after=rows[first].num_after,
            )
            if has_zero_keys:
                num_zero_keys = -(-segment_length // rate) - block.segment_rows
                block = replace(block, num_zero_keys=num_zero_keys)
            yield block


def _segments(segment_length: int, seq_len: int, part: range) -> Iterator[tuple[range, range, int]]:
    """Whole segment, tokens of it in the part, and how many alike follow each other."""
    start = part.start
    while start < part.stop:
        begin = start - start % segment_length
        segment = range(begin, min(begin + segment_length, seq_len))
        is_full = begin == start and len(segment) == segment_length
        count = (part.stop - start) // segment_length if is_full else 0
        stop = start + segment_length if count else min(segment.stop, part.stop)
        yield segment, range(start, stop), max(1, count)
        start += max(count * segment_length, stop - start)


@dataclass(frozen=True)
class _Rows:
    """Rows of a segment that a head takes: the first in the part, and how many there and around."""

    first: int
    num_own: int
    num_before: int
    num_after: int

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.num_own, self.num_before, self.num_after


def _rows_of(segment: range, own: range, offset: int, rate: int) -> _Rows:
    begin = segment.start + offset
    num_before = len(range(begin, own.start, rate))
    num_reached = len(range(begin, own.stop, rate))
    num_all = len(range(begin, segment.stop, rate))
    first = begin + num_before * rate
    return _Rows(first, num_reached - num_before, num_before, num_all - num_reached)


def _head_groups(rows: list[_Rows], group_size: int) -> list[list[int]]:
    """Splits the heads into few groups, each an arithmetic progression with equal row counts.

    Heads with the same rows form one, and so do neighbouring heads whose rows shift by one; what
    gives fewer calls depends on the number of heads per offset.
    """
    present = [head for head, row in enumerate(rows) if row.num_own]
    by_offset = [
        run
        for row in sorted({rows[head].first for head in present})
        for run in _progressions([h for h in present if rows[h].first == row], rows, group_size)
    ]
    by_neighbour = [
        run
        for _, heads in groupby(present, key=lambda head: rows[head].counts)
        for run in _progressions(list(heads), rows, group_size)
    ]
    return min(by_offset, by_neighbour, key=len)


def _progressions(heads: list[int], rows: list[_Rows], group_size: int) -> Iterator[list[int]]:
    """Cuts heads into the longest runs in which head, rows and key head each step evenly."""
    while heads:
        size = 1

        def step(index: int, heads: list[int] = heads) -> tuple[int, int, int]:
            a, b = heads[index - 1], heads[index]
            return b - a, rows[b].first - rows[a].first, b // group_size - a // group_size

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
