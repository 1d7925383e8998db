"""A pattern over a batch of sequences as tables, from which one launch serves a whole branch.

*Partials* are the results of a branch for the rows it has, numbered without gaps: first by
sequence, then by segment, then by row. The last branch of the tables covers every row and has none:
it is the pattern's first one of rate 1, or one that attends to nothing where there is no such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from .pattern import DENSE_SEGMENT, DilatedPattern
from .sequences import SequenceGroup

__all__ = ["FusedSchedule", "Launch", "fused_schedule"]

# A limit of CUDA's grids is 65,535 in this direction.
_MAX_SEQUENCES = 2**15


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Sequences of similar length that one launch serves; the longest decides the grid."""

    first: int
    count: int
    max_length: int


@dataclass(frozen=True, kw_only=True)
class FusedSchedule:
    """What the kernels read, and what a launch is planned by.

    The tables lie on the host, pinned for a GPU: each call copies them without waiting, which a
    CUDA graph can record. Tables kept on the GPU would belong to the memory of the first graph.

    Attributes:
        sequences: Batch row, first token, length, and the first partial of each branch but the
            last, int64 (num_sequences, 3 + num_others).
        branches: Segment length and rate, int32 (num_branches, 2).
        offsets: Offset of each head, int32 (num_branches, num_heads).
        launches: The sequences, longest first.
        lengths: The same as `branches`, on the host.
        attends: Whether the last branch attends, or only merges.
        num_partials: Partials of each head.
    """

    sequences: Tensor
    branches: Tensor
    offsets: Tensor
    launches: tuple[Launch, ...]
    lengths: tuple[tuple[int, int], ...]
    attends: bool
    num_partials: int

    @property
    def last(self) -> int:
        """Number of the branch that covers every row."""
        return len(self.lengths) - 1

    def segment_rows(self, branch: int, length: int) -> int:
        """Rows that a full segment of a branch has in a sequence."""
        return _segments(*self.lengths[branch], length)[0][1]

    def num_rows(self, branch: int, length: int) -> int:
        """Rows that a branch has in a sequence, in all segments."""
        return _num_rows(*self.lengths[branch], length)

    def num_tiles(self, branch: int, length: int, block: int) -> int:
        """Tiles of `block` rows that a branch has in a sequence, for each head."""
        return sum(
            count * -(-rows // block) for count, rows in _segments(*self.lengths[branch], length)
        )


@lru_cache(maxsize=256)
def fused_schedule(
    pattern: DilatedPattern,
    groups: tuple[SequenceGroup, ...],
    num_heads: int,
    is_pinned: bool,
    *,
    attends: bool = True,
) -> FusedSchedule:
    """Makes the tables; kept, since every layer and both passes ask for the same ones.

    Args:
        pattern: The schedule.
        groups: The sequences that are attended by themselves.
        num_heads: Query heads.
        is_pinned: Whether the tables are to be copied to a GPU.
        attends: Whether the last branch attends, if one has rate 1; else it merges only.
    """
    order = list(range(len(pattern.branches)))
    attends = attends and 1 in pattern.dilation_rates
    if attends:
        order.append(order.pop(pattern.dilation_rates.index(1)))
    # No sequence is as long as what these bounds cut off.
    lengths = [
        (min(width, DENSE_SEGMENT), min(rate, DENSE_SEGMENT))
        for width, rate in (pattern.branches[branch] for branch in order)
    ]
    offsets = [pattern.offsets(branch, num_heads) for branch in order]
    if not attends:
        lengths.append((DENSE_SEGMENT, 1))
        offsets.append((0,) * num_heads)
    sequences = sorted(
        ((*start, group.length) for group in groups for start in group.starts()),
        key=lambda sequence: -sequence[2],
    )
    lines = [list(sequence) for sequence in sequences]
    num_partials = 0
    for branch in lengths[:-1]:
        for line in lines:
            line.append(num_partials)
            num_partials += _num_rows(*branch, line[2])
    return FusedSchedule(
        sequences=torch.tensor(lines, dtype=torch.int64, pin_memory=is_pinned),
        branches=torch.tensor(lengths, dtype=torch.int32, pin_memory=is_pinned),
        offsets=torch.tensor(offsets, dtype=torch.int32, pin_memory=is_pinned),
        launches=tuple(_launches([length for _, _, length in sequences])),
        lengths=tuple(lengths),
        attends=attends,
        num_partials=num_partials,
    )


def _segments(segment_length: int, rate: int, length: int) -> list[tuple[int, int]]:
    """(number of segments, rows of each): the full ones, and the tail."""
    width = min(segment_length, length)
    count, tail = divmod(length, width)
    return [(count, -(-width // rate)), (1 if tail else 0, -(-tail // rate))]


def _num_rows(segment_length: int, rate: int, length: int) -> int:
    return sum(count * rows for count, rows in _segments(segment_length, rate, length))


def _launches(lengths: list[int]) -> Iterator[Launch]:
    """Groups falling lengths by powers of two: tiles that do not exist cost a launch little."""
    first = 0
    for _, similar in groupby(lengths, key=int.bit_length):
        stop = first + len(list(similar))
        for start in range(first, stop, _MAX_SEQUENCES):
            count = min(_MAX_SEQUENCES, stop - start)
            yield Launch(first=start, count=count, max_length=lengths[start])
        first = stop
