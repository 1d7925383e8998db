"""Which sequences processes share: parts of them, found from what each process has.

Shape legend: b batch, c tokens of a part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_zoo.ops.sequences import SequenceGroup

from .layout import gather_rows

__all__ = [
    "FoundSequences",
    "SplitSequences",
    "check_bias",
    "check_bounds",
    "check_mask",
    "check_whole_bounds",
    "find_sequences",
]


@dataclass(frozen=True, kw_only=True)
class SplitSequences:
    """Sequences of which each process has a part.

    Attributes:
        part_length: Tokens of each row of the batch that a process has.
        num_parts: Number of processes.
        lengths: Tokens of the sequence in each row of the batch, at most part_length * num_parts.
        bounds: Boundaries of the sequences packed in the only row, from 0, instead of `lengths`.
    """

    part_length: int
    num_parts: int
    lengths: tuple[int, ...] = ()
    bounds: tuple[int, ...] = ()

    def groups(self, part: int) -> list[SequenceGroup]:
        """Lists what a process has of the sequences."""
        begin = part * self.part_length
        groups = []
        if self.bounds:
            for start, stop in pairwise(self.bounds):
                first, end = max(start, begin), min(stop, begin + self.part_length)
                if first < end:
                    one = SequenceGroup(
                        is_packed=True,
                        first=first - begin,
                        count=1,
                        length=end - first,
                        start=first - start,
                        whole_length=stop - start,
                    )
                    groups.append(one)
            return _joined(groups)
        row = 0
        for seq_len, equals in groupby(self.lengths):
            count = len(list(equals))
            length = min(seq_len - begin, self.part_length)
            if length > 0:
                one = SequenceGroup(
                    is_packed=False,
                    first=row,
                    count=count,
                    length=length,
                    start=begin,
                    whole_length=seq_len,
                )
                groups.append(one)
            row += count
        return groups

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        spans = [stop - start for start, stop in pairwise(self.bounds)]
        return max(*spans, *self.lengths, 1)


def _joined(groups: list[SequenceGroup]) -> list[SequenceGroup]:
    """Joins whole packed sequences of equal length that follow each other."""
    joined: list[SequenceGroup] = []
    for group in groups:
        last = joined[-1] if joined else None
        is_whole = group.length == group.seq_len
        if last is not None and is_whole and replace(last, first=group.first, count=1) == group:
            joined[-1] = replace(last, count=last.count + 1)
        else:
            joined.append(group)
    return joined


class FoundSequences(NamedTuple):
    """The sequences that processes share, and the mask where padding is not only at their ends."""

    sequences: SplitSequences
    is_hidden: Tensor | None


def find_sequences(
    x: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    group: dist.ProcessGroup,
) -> FoundSequences:
    """Finds the sequences that the processes of a group share.

    Args:
        x: This process's part, (batch, c, ...).
        key_padding_mask: True at padding, bool (batch, c), or None on all processes.
        cu_seqlens: Boundaries of packed sequences in the whole row, int32 (num_sequences + 1,).
        group: The processes.

    Raises:
        ValueError: If the mask or the boundaries do not fit.
        TypeError: If one of them is of another dtype.
    """
    batch, length = x.shape[:2]
    split = partial(SplitSequences, part_length=length, num_parts=group.size())
    all_tokens = (length * group.size(),) * batch
    if cu_seqlens is not None:
        if key_padding_mask is not None:
            raise ValueError(
                "give either cu_seqlens or key_padding_mask, not both: what lies behind the last "
                "boundary is padding."
            )
        bounds = check_bounds(cu_seqlens, batch, length * group.size())
        return FoundSequences(split(bounds=bounds), None)
    if key_padding_mask is None:
        return FoundSequences(split(lengths=all_tokens), None)
    check_mask(key_padding_mask, batch, length)
    num_real = length - key_padding_mask.sum(1)
    is_behind = torch.arange(length, device=x.device) >= num_real[:, None]
    is_right = (key_padding_mask == is_behind).all(1)
    mine = torch.stack([num_real, is_right])
    all_parts = gather_rows(mine, group.group_name, group.size())
    counts, is_right = all_parts.cpu().unflatten(0, (group.size(), 2)).unbind(1)
    lengths = counts.sum(0)
    starts = length * torch.arange(group.size())[:, None]
    # Each part is as full as the whole length says.
    is_right = is_right.bool() & (counts == (lengths - starts).clamp(0, length))
    if bool(is_right.all()):
        return FoundSequences(split(lengths=tuple(lengths.tolist())), None)
    return FoundSequences(split(lengths=all_tokens), key_padding_mask)


def check_bias(bias: object) -> None:
    """Refuses a bias by pairs of positions; raises NotImplementedError."""
    if isinstance(bias, Tensor):
        raise NotImplementedError(
            "bias must be a function of distances where processes share a sequence, got a tensor "
            f"of the shape {tuple(bias.shape)}: each process has a part of the keys only."
        )


def check_mask(key_padding_mask: Tensor, batch: int, part_length: int) -> None:
    """Refuses a mask that is not that of a part; raises ValueError."""
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != (batch, part_length):
        raise ValueError(
            "key_padding_mask must be bool (batch, tokens of this process) = "
            f"{(batch, part_length)}, True at padding, got {key_padding_mask.dtype} "
            f"{tuple(key_padding_mask.shape)}. parallel.shard_padding_mask makes it."
        )


def check_bounds(cu_seqlens: Tensor, batch: int, num_tokens: int) -> tuple[int, ...]:
    """Reads the boundaries of packed sequences.

    Args:
        cu_seqlens: int32 (num_sequences + 1,).
        batch: Rows of the batch.
        num_tokens: Tokens of the whole row, padding at its end included.

    Raises:
        ValueError: If they do not rise from 0, or go beyond the row, or there are several rows.
        TypeError: If they are of another dtype or shape.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise TypeError(
            "cu_seqlens must be int32 (num_sequences + 1,), with at least one sequence, got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens needs sequences packed in one row (batch 1), got batch={batch}. "
            "Flatten the batch into the sequence."
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > num_tokens or sorted(set(bounds)) != bounds:
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to at most {num_tokens}, the tokens of all "
            f"parts together, got {bounds}."
        )
    return tuple(bounds)


def check_whole_bounds(
    cu_seqlens: Tensor, batch: int, seq_len: int, key_padding_mask: Tensor | None
) -> None:
    """Refuses boundaries that are not those of a whole row; raises ValueError or TypeError."""
    if key_padding_mask is not None:
        raise ValueError(
            "give either cu_seqlens or key_padding_mask, not both: leave padding out of the row."
        )
    if check_bounds(cu_seqlens, batch, seq_len)[-1] != seq_len:
        raise ValueError(f"cu_seqlens must end at seq_len={seq_len}, got {cu_seqlens.tolist()}.")
