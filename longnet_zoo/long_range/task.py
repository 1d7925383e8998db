"""What a long-range task is: examples drawn from a rule, as many as one wants, always the same.

Example `index` of a seed is a function of both alone, so loaders, workers and resumed runs agree.
An example belongs to the split that a hash of its tokens says, so that no seed can bring a training
example into a test.

Labels stand where the answer is read: `labels[i]` is what the output at position i must be, and
`IGNORE_INDEX` where nothing is asked. Answers are token ids.

Shape legend: b batch, n seq_len.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "IGNORE_INDEX",
    "Example",
    "Split",
    "Task",
    "check_number",
    "check_range",
    "stack_examples",
]

IGNORE_INDEX = -100

Split = Literal["train", "val", "test"]

_SPLITS: tuple[str, ...] = get_args(Split)
# An eighth of all examples is for validation, another one for the test.
_SPLIT_OF_HASH = (*["train"] * 6, "val", "test")
# A split with one sequence of a thousand is missed by so many draws once in 20,000 times.
_MAX_DRAWS = 10_000
# Of tokens, pairs or ids. To draw an example of more takes longer than anybody waits for it.
_MOST = 2**24


class Example(NamedTuple):
    """One sequence, int64 (n,), and what is asked of it, int64 (n,)."""

    tokens: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Base of the tasks; a subclass is the options of one, and draws its examples.

    Attributes:
        seq_len: Tokens of an example.
    """

    seq_len: int

    name: ClassVar[str]
    # Whether an answer of several tokens counts only as a whole.
    scores_whole: ClassVar[bool] = False
    # Id that fills up sequences which are shorter than `seq_len`.
    pad_id: ClassVar[int | None] = None
    # Id that hides the answer from a model that sees both sides; None where it is nowhere written.
    mask_id: ClassVar[int | None] = None

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids, answers included."""

    @property
    @abc.abstractmethod
    def num_labels(self) -> int:
        """Labels of an example, at most."""

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy of a guess among the answers that an example leaves open."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Example:
        """Draws an example.

        Args:
            rng: All that is random about it.
        """

    def example(self, index: int, *, split: Split, seed: int = 0) -> Example:
        """Returns an example of a split.

        Args:
            index: Its number, from 0.
            split: "train", "val" or "test".
            seed: Another seed has other examples.

        Raises:
            ValueError: The split is unknown or without examples, or `index` or `seed` negative.
        """
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {_SPLITS}, got {split!r}.")
        if index < 0 or seed < 0:
            raise ValueError(f"index and seed must be 0 or more, got {index=} and {seed=}.")
        rng = np.random.default_rng((seed, index))
        for _ in range(_MAX_DRAWS):
            example = self.draw(rng)
            if _split_of(example.tokens) == split:
                return example
        raise ValueError(
            f"a task must have examples in every split, got none for {split!r} in {_MAX_DRAWS:,} "
            f"draws of {self}, which allows too few different sequences. Raise seq_len, or "
            "vocab_size where the task has it."
        )

    def batch(self, indices: Iterable[int], *, split: Split, seed: int = 0) -> dict[str, Tensor]:
        """Returns examples as `tokens` and `labels`, both int64 (b, n).

        Args:
            indices: Their numbers.
            split: As for `example`.
            seed: As for `example`.
        """
        return stack_examples([self.example(index, split=split, seed=seed) for index in indices])


def stack_examples(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Returns examples as `tokens` and `labels`, both int64 (b, n)."""
    tokens, labels = zip(*examples, strict=True)
    return {
        "tokens": torch.from_numpy(np.stack(tokens)),
        "labels": torch.from_numpy(np.stack(labels)),
    }


def check_range(name: str, value: object, *, least: int, cure: str = "") -> None:
    """Refuses what is no integer, too small, or beyond what can be drawn.

    Raises:
        TypeError: It is no integer.
        ValueError: It is smaller than `least`, or larger than 2**24.
    """
    if type(value) is not int:
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}. {cure}".rstrip())
    if value > _MOST:
        raise ValueError(f"{name} must be {_MOST:,} or less, got {value}.")


def check_number(name: str, value: object) -> None:
    """Refuses what is no number, with a TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def _split_of(tokens: np.ndarray) -> str:
    digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=1).digest()
    return _SPLIT_OF_HASH[digest[0] % len(_SPLIT_OF_HASH)]
