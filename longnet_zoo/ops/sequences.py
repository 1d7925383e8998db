"""The sequences in a batch: rows of a padded batch, or stretches of one packed row.

Shape legend: b batch, n seq_len, c sequences of a group, l their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .arguments import can_read

__all__ = ["SequenceGroup", "split_sequences"]


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """Sequences, or parts of some, of equal length at equal distances in a tensor (b, n, ...).

    Attributes:
        is_packed: Whether they lie in one row behind each other, not in rows of the batch.
        first: Row of the batch, or position in the packed row, of the first one.
        count: How many they are.
        length: Tokens of each that are in the tensor.
        start: Place of the first of these in the whole sequence.
        whole_length: Tokens of the whole sequence; None: `length`, nothing is elsewhere.
    """

    is_packed: bool
    first: int
    count: int
    length: int
    start: int = 0
    whole_length: int | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return self.length if self.whole_length is None else self.whole_length

    def starts(self) -> list[tuple[int, int]]:
        """Batch row and first token of each sequence."""
        if self.is_packed:
            return [(0, self.first + index * self.length) for index in range(self.count)]
        return [(self.first + index, 0) for index in range(self.count)]

    def select(self, x: Tensor) -> Tensor:
        """Views the group's part of x (b, n, ...) as (c, l, ...)."""
        if self.is_packed:
            rows = x[0, self.first : self.first + self.count * self.length]
            return rows.unflatten(0, (self.count, self.length))
        return x[self.first : self.first + self.count, : self.length]

    def select_pairs(self, x: Tensor) -> Tensor:
        """Views the group's part of x (b, h, n, n) as (c, h, l, l); a packed group has c = 1."""
        if self.is_packed:
            span = slice(self.first, self.first + self.length)
            return x[:, :, span, span]
        return x[self.first : self.first + self.count, :, : self.length, : self.length]


def split_sequences(
    x: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None, *, is_single: bool
) -> tuple[list[SequenceGroup], Tensor | None]:
    """Finds the sequences that are attended by themselves.

    While a CUDA graph is captured no mask can be read, so right padding stays a mask as well.

    Args:
        x: Any tensor (b, n, ...).
        key_padding_mask: True at padding, (b, n). Right padding becomes the sequences' lengths.
        cu_seqlens: Boundaries of packed sequences, (num_sequences + 1,), when b is 1.
        is_single: Whether each group holds one packed sequence only.

    Returns:
        The groups, and the mask where it is more than right padding.

    Raises:
        ValueError: If `cu_seqlens` does not rise from 0 to n.
        NotImplementedError: If `cu_seqlens` cannot be read, since a CUDA graph is captured.
    """
    batch, seq_len = x.shape[:2]
    if cu_seqlens is not None:
        if not can_read(cu_seqlens):
            raise NotImplementedError(
                "cu_seqlens decides what is computed, so it cannot be part of a CUDA graph, got "
                f"{len(cu_seqlens) - 1} packed sequences while one is captured. Pass a batch with "
                "key_padding_mask, or run without a graph."
            )
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != seq_len or sorted(set(bounds)) != bounds:
            raise ValueError(
                f"cu_seqlens must rise strictly from 0 to seq_len={seq_len}, got {bounds}."
            )
        lengths = [stop - start for start, stop in pairwise(bounds)]
        return _grouped(lengths, is_packed=True, is_single=is_single), None
    if key_padding_mask is None:
        return _grouped([seq_len] * batch, is_packed=False), None
    if not can_read(key_padding_mask):
        return _grouped([seq_len] * batch, is_packed=False), key_padding_mask
    lengths_tensor = seq_len - key_padding_mask.sum(1)
    is_beyond = torch.arange(seq_len, device=x.device) >= lengths_tensor[:, None]
    if torch.equal(key_padding_mask, is_beyond):
        return _grouped(lengths_tensor.tolist(), is_packed=False), None
    return _grouped([seq_len] * batch, is_packed=False), key_padding_mask


def _grouped(
    lengths: list[int], *, is_packed: bool, is_single: bool = False
) -> list[SequenceGroup]:
    groups = []
    first = 0
    for length, equals in groupby(lengths):
        num_equal = len(list(equals))
        counts = [1] * num_equal if is_single else [num_equal]
        for count in counts:
            if length:
                groups.append(
                    SequenceGroup(is_packed=is_packed, first=first, count=count, length=length)
                )
            first += count * length if is_packed else count
    return groups
