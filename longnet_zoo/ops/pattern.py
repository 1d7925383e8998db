"""Which positions attend to which: the schedule of LongNet's dilated attention.

A pattern is a list of *branches*, each a segment length w and a dilation rate r (LongNet,
arXiv 2307.02486, Sec. 2.2-2.3). With effective length w' = min(w, seq_len), position i lies in
segment i // w' at place p = i % w'. Query i of head h takes part in a branch iff
p % r == offset(h), and then sees the keys of its segment with the same property. Attention runs
over the multiset union of all branches: a key that two branches reach counts twice.

Shape legend: n seq_len, h num_heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["DENSE_SEGMENT", "DilatedPattern", "HeadOffset", "PaddedKeys", "check_seq_len"]

# One segment longer than any sequence: dense attention.
DENSE_SEGMENT = 2**30
# What PyTorch passes to operators has 64 bits.
_LONGEST = 2**63 - 1

HeadOffset = Literal["modulo", "block"]
PaddedKeys = Literal["ignore", "zero"]


def check_seq_len(seq_len: int) -> None:
    """Refuses a sequence of no tokens, or of fewer."""
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}.")


@dataclass(frozen=True, kw_only=True)
class DilatedPattern:
    """Segment lengths and dilation rates of dilated attention, validated and hashable.

    Attributes:
        segment_lengths: Tokens per segment of each branch, strictly increasing.
        dilation_rates: Step between the tokens of a segment that a head uses, one per branch,
            between 1 and the branch's segment length. It need not divide the segment length.
        head_offset: Where the step starts for head h. `"modulo"`: h % r (the paper, Eq. 13).
            `"block"`: h // ceil(num_heads / r), as in the published torchscale weights.
        padded_keys: What fills an incomplete segment when attention is not causal. `"ignore"`:
            nothing. `"zero"`: zero keys that take softmax mass, as published weights were trained.
        first_head: The head of the layer that is head 0 here, where heads are spread over
            processes.
        total_heads: Heads of the whole layer; None: those that are here.

    Raises:
        ValueError: If a length or rate is out of range, or the two do not pair up.
        TypeError: If a length or rate is not an integer.

    Example:
        >>> pattern = DilatedPattern(segment_lengths=(2048, 4096), dilation_rates=(1, 2))
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offset: HeadOffset = "modulo"
    padded_keys: PaddedKeys = "ignore"
    first_head: int = field(default=0, repr=False)
    total_heads: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        lengths, rates = self.segment_lengths, self.dilation_rates
        if not lengths or len(lengths) != len(rates):
            raise ValueError(
                "segment_lengths and dilation_rates must name at least one branch and have the "
                f"same length, got segment_lengths={lengths} and dilation_rates={rates}."
            )
        if lengths[0] < 1 or any(a >= b for a, b in pairwise(lengths)):
            raise ValueError(
                f"segment_lengths must be positive and strictly increasing, got {lengths}. "
                "Sort them, and give each length once."
            )
        if lengths[-1] > _LONGEST:
            raise ValueError(
                f"segment_lengths must be {_LONGEST} or less, got {lengths[-1]}. DENSE_SEGMENT is "
                "longer than any sequence."
            )
        for length, rate in self.branches:
            if not 1 <= rate <= length:
                raise ValueError(
                    "dilation_rates must lie between 1 and their segment length, "
                    f"got rate {rate} for segment length {length}."
                )
        _check_choice("head_offset", self.head_offset, get_args(HeadOffset))
        _check_choice("padded_keys", self.padded_keys, get_args(PaddedKeys))

    @classmethod
    def geometric(
        cls,
        min_segment_length: int,
        max_segment_length: int,
        *,
        ratio: int = 2,
        head_offset: HeadOffset = "modulo",
        padded_keys: PaddedKeys = "ignore",
    ) -> DilatedPattern:
        """Builds the paper's kind of pattern: lengths and rates grow by the same ratio.

        Args:
            min_segment_length: Segment length of the first branch, whose rate is 1.
            max_segment_length: Segment length of the last branch.
            ratio: Factor from branch to branch, at least 2.
            head_offset: As for the class.
            padded_keys: As for the class.

        Raises:
            ValueError: If powers of `ratio` do not lead from the first length to the last.
        """
        if ratio < 2 or not 1 <= min_segment_length <= max_segment_length:
            raise ValueError(
                "geometric needs ratio >= 2 and 1 <= min_segment_length <= max_segment_length, got "
                f"{ratio=}, {min_segment_length=} and {max_segment_length=}."
            )
        rates = [1]
        while min_segment_length * rates[-1] < max_segment_length:
            rates.append(rates[-1] * ratio)
        if min_segment_length * rates[-1] != max_segment_length:
            raise ValueError(
                "max_segment_length must be min_segment_length times a power of ratio, got "
                f"{min_segment_length=}, {max_segment_length=} and {ratio=}. "
                f"Nearest: {min_segment_length * rates[-2]} or {min_segment_length * rates[-1]}."
            )
        return cls(
            segment_lengths=tuple(min_segment_length * rate for rate in rates),
            dilation_rates=tuple(rates),
            head_offset=head_offset,
            padded_keys=padded_keys,
        )

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key, in a sequence of any length."""
        return self.segment_lengths[0] >= DENSE_SEGMENT and self.dilation_rates == (1,)

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """(segment_length, dilation_rate) of each branch."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    @property
    def is_nested(self) -> bool:
        """Whether every segment of a branch lies inside one segment of the longest branch."""
        return all(self.segment_lengths[-1] % length == 0 for length in self.segment_lengths)

    def offsets(self, branch: int, num_heads: int) -> tuple[int, ...]:
        """Offset of each head in a branch: the place in the segment at which its steps start."""
        rate = self.dilation_rates[branch]
        heads = range(self.first_head, self.first_head + num_heads)
        if self.head_offset == "modulo":
            return tuple(head % rate for head in heads)
        heads_per_offset = -(-(self.total_heads or num_heads) // rate)
        return tuple(head // heads_per_offset for head in heads)

    def attended_pairs(self, seq_len: int, num_heads: int, *, is_causal: bool = False) -> int:
        """Counts the (query, key) pairs of all heads and branches; zero keys are not counted.

        Raises:
            ValueError: If `seq_len` is below 1.
        """
        check_seq_len(seq_len)
        pairs = 0
        for branch, (segment_length, rate) in enumerate(self.branches):
            length = min(segment_length, seq_len)
            for offset in self.offsets(branch, num_heads):
                for segment, count in ((length, seq_len // length), (seq_len % length, 1)):
                    rows = len(range(offset, segment, rate))
                    pairs += count * (rows * (rows + 1) // 2 if is_causal else rows * rows)
        return pairs

    def flops(
        self, seq_len: int, num_heads: int, head_dim: int, *, is_causal: bool = False
    ) -> tuple[int, int]:
        """Multiply-adds counted as two FLOPs: (forward, backward), for one sequence.

        The forward pass multiplies two matrices per attended pair (4 * head_dim FLOPs), the
        backward pass five (10 * head_dim), one of them to recompute the logits.
        """
        pairs = self.attended_pairs(seq_len, num_heads, is_causal=is_causal)
        return 4 * head_dim * pairs, 10 * head_dim * pairs

    def mask_counts(self, seq_len: int, num_heads: int, *, is_causal: bool = False) -> Tensor:
        """How many branches let query i of head h see key j: int64, (num_heads, n, n).

        For looking at a pattern and for tests; its memory is quadratic in `seq_len`.
        """
        positions = torch.arange(seq_len)
        counts = torch.zeros(num_heads, seq_len, seq_len, dtype=torch.int64)
        for branch, (segment_length, rate) in enumerate(self.branches):
            length = min(segment_length, seq_len)
            offsets = torch.tensor(self.offsets(branch, num_heads))
            is_used = (positions % length) % rate == offsets[:, None]
            segments = positions // length
            is_same_segment = segments[:, None] == segments[None, :]
            counts += is_used[:, :, None] & is_used[:, None, :] & is_same_segment
        return counts.tril() if is_causal else counts


def _integers(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(type(value) is int for value in values):
        raise TypeError(f"{name} must be a tuple of integers, got {values!r}.")
    return tuple(values)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
