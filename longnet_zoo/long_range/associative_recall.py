"""Multi-query associative recall (Arora et al., arXiv 2312.04927): look a key up, many times.

K pairs of key and value come first, key before value. Then each key comes once more, in any order,
and the model must say its value there. The published generator (zoology, `multiquery_ar.py`) sets
the repeated keys on every second place behind the pairs; that the s-th such place is taken has
probability in proportion to a * s^(a-1), so a small a puts most of them near the pairs. All places
without a key hold random tokens. Keys come from the lower half of the vocabulary, values from the
upper one, and neither comes twice in an example.

The value is nowhere written behind its key, so the same sequence serves a model that sees both
sides. Unlike the published generator, this one lets sequences be longer than the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .task import IGNORE_INDEX, Example, Task, check_number, check_range

__all__ = ["AssociativeRecall"]

# Half of the queries then lie in the last 7 % of the places; no power of a length overflows.
_LARGEST_POWER = 10


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Options of multi-query associative recall.

    Attributes:
        seq_len: Tokens of an example, even, at least four for each pair.
        vocab_size: Number of token ids; 0 is no key.
        num_pairs: Pairs of key and value, so many are also looked up; None: one for 16 tokens.
        power: The exponent a of the gaps, above 0, at most 10; 1 spreads the queries evenly.
    """

    seq_len: int = 1024
    vocab_size: int = 8192
    num_pairs: int | None = None
    power: float = 0.01

    name: ClassVar[str] = "mqar"

    def __post_init__(self) -> None:
        least, cure = 16, "A shorter one needs num_pairs."
        if self.num_pairs is not None:
            check_range("num_pairs", self.num_pairs, least=1)
            least, cure = 4 * self.num_pairs, "Use fewer num_pairs."
        check_range("seq_len", self.seq_len, least=least, cure=cure)
        check_range("vocab_size", self.vocab_size, least=2 * (self.num_labels + 1))
        if self.seq_len % 2:
            raise ValueError(f"seq_len must be even for mqar, got {self.seq_len}.")
        check_number("power", self.power)
        if not 0 < self.power <= _LARGEST_POWER:
            raise ValueError(
                f"power must be above 0 and at most {_LARGEST_POWER}, got {self.power}."
            )

    @property
    def num_labels(self) -> int:
        """One value for each key."""
        return self.seq_len // 16 if self.num_pairs is None else self.num_pairs

    @property
    def chance(self) -> float:
        """A guess among the values of the example."""
        return 1 / self.num_labels

    def draw(self, rng: np.random.Generator) -> Example:
        """Draws an example."""
        half, num_pairs = self.vocab_size // 2, self.num_labels
        keys = 1 + rng.choice(half - 1, num_pairs, replace=False)
        values = half + rng.choice(self.vocab_size - half, num_pairs, replace=False)
        tokens = rng.integers(self.vocab_size, size=self.seq_len)
        first = 2 * num_pairs
        tokens[0:first:2], tokens[1:first:2] = keys, values
        places = first + 2 * self._draw_slots(rng)
        tokens[places] = keys
        labels = np.full(self.seq_len, IGNORE_INDEX)
        labels[places] = values
        return Example(tokens, labels)

    def _draw_slots(self, rng: np.random.Generator) -> np.ndarray:
        num_slots = self.seq_len // 2 - self.num_labels
        weights = np.arange(1, num_slots + 1) ** (self.power - 1.0)
        return rng.choice(num_slots, self.num_labels, replace=False, p=weights / weights.sum())
