"""Selective copying (Gu and Dao, arXiv 2312.00752): pick the data out of the noise, in order.

Data tokens lie at random places among noise tokens. At the end comes one marker for each: at the
i-th marker the model must say the i-th data token. Markers are all alike, so nothing but counting
tells them apart. Of the 16 ids of the paper, 0 is noise, 15 the marker and the others are data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .task import IGNORE_INDEX, Example, Task, check_range

__all__ = ["SelectiveCopying"]

_NOISE = 0


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Options of selective copying.

    Attributes:
        seq_len: Tokens of an example, markers included.
        num_data_tokens: Tokens to copy.
        vocab_size: Number of token ids, of which noise and marker are two.
    """

    seq_len: int = 4096
    num_data_tokens: int = 16
    vocab_size: int = 16

    name: ClassVar[str] = "selective_copying"

    def __post_init__(self) -> None:
        check_range("num_data_tokens", self.num_data_tokens, least=1)
        check_range("vocab_size", self.vocab_size, least=4)
        cure = "Use fewer num_data_tokens."
        check_range("seq_len", self.seq_len, least=2 * self.num_data_tokens, cure=cure)

    @property
    def num_labels(self) -> int:
        """One for each marker."""
        return self.num_data_tokens

    @property
    def chance(self) -> float:
        """A guess among the data tokens."""
        return 1 / (self.vocab_size - 2)

    def draw(self, rng: np.random.Generator) -> Example:
        """Draws an example."""
        num_markers = self.num_data_tokens
        first_marker = self.seq_len - num_markers
        data = rng.integers(1, self.vocab_size - 1, size=num_markers)
        places = np.sort(rng.choice(first_marker, num_markers, replace=False))
        tokens = np.full(self.seq_len, _NOISE)
        tokens[places] = data
        tokens[first_marker:] = self.vocab_size - 1
        labels = np.full(self.seq_len, IGNORE_INDEX)
        labels[first_marker:] = data
        return Example(tokens, labels)
