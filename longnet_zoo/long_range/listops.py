"""ListOps of Long Range Arena (Tay et al., arXiv 2011.04006; Nangia and Bowman, arXiv 1804.06028).

`[MAX 4 3 [MIN 2 3 ] 1 0 ]` is 4: nested lists of digits, of which minimum, maximum, median (rounded
down) or sum modulo 10 is asked. Trees are drawn by the published rule (`listops.py`): a node is a
digit with probability 0.75, and always at the largest depth, else an operator with 2 to 10
arguments. Of these trees only those are kept whose number of tokens lies in a range; as published
the range is 500 to 2,000, both excluded, and the depth 10.

For other lengths the range grows in proportion, and the depth so far that trees of this size are as
frequent as those of the published one: a tree with one more level is about 1.5 times as large,
since a node has 0.25 * 6 operators below it. A token "=" ends the expression, and there the value
is asked; padding follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .task import IGNORE_INDEX, Example, Task, check_range

__all__ = ["ListOps"]

_PUBLISHED_LENGTH = 2000
_PUBLISHED_DEPTH = 10
_VALUE_PROBABILITY = 0.75
_MAX_ARGUMENTS = 10
_OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
_SYMBOLS = (*map(str, range(10)), *_OPERATORS, "]", "=")
_FIRST_OPERATOR, _CLOSE, _EQUALS = 10, 14, 15
_SHORTEST = 16


class _TooLongError(Exception):
    """A tree has outgrown its range."""


@dataclass(frozen=True, kw_only=True)
class ListOps(Task):
    """Options of ListOps.

    Attributes:
        seq_len: Tokens of an example with padding; expressions have fewer tokens than this, and
            more than a quarter of it.
    """

    seq_len: int = _PUBLISHED_LENGTH

    name: ClassVar[str] = "listops"
    pad_id: ClassVar[int | None] = len(_SYMBOLS)

    def __post_init__(self) -> None:
        check_range("seq_len", self.seq_len, least=_SHORTEST)

    @property
    def depth(self) -> int:
        """Depth at which a node is always a digit, the root at 1."""
        growth = max(1.0, self.seq_len / _PUBLISHED_LENGTH)
        return _PUBLISHED_DEPTH + math.ceil(math.log(growth, 1.5))

    @property
    def vocab_size(self) -> int:
        """Digits, operators, the closing bracket, the equals sign and padding."""
        return len(_SYMBOLS) + 1

    @property
    def num_labels(self) -> int:
        """The value."""
        return 1

    @property
    def chance(self) -> float:
        """A guess among the digits; they are not equally frequent, so a constant does better."""
        return 0.1

    def draw(self, rng: np.random.Generator) -> Example:
        """Draws an example."""
        while True:
            expression: list[int] = []
            try:
                value = _grow(_Draws(rng), expression, self.seq_len, self.depth)
            except _TooLongError:
                continue
            if self.seq_len // 4 < len(expression) < self.seq_len:
                break
        tokens = np.full(self.seq_len, self.pad_id)
        tokens[: len(expression)] = expression
        tokens[len(expression)] = _EQUALS
        labels = np.full(self.seq_len, IGNORE_INDEX)
        labels[len(expression)] = value
        return Example(tokens, labels)

    @staticmethod
    def text(tokens: np.ndarray) -> str:
        """Returns an expression as one writes it, without padding."""
        return " ".join(_SYMBOLS[token] for token in tokens if token < len(_SYMBOLS))


class _Draws:
    """Uniform numbers, drawn many at a time, which is ten times as quick as one by one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._waiting: list[float] = []

    def uniform(self) -> float:
        if not self._waiting:
            self._waiting = self._rng.random(512).tolist()
        return self._waiting.pop()

    def below(self, number: int) -> int:
        return int(self.uniform() * number)


def _grow(draws: _Draws, expression: list[int], limit: int, levels: int) -> int:
    """Appends a random tree of at most so many levels, and returns its value.

    Raises:
        _TooLongError: The expression has reached the limit.
    """
    if levels == 1 or draws.uniform() < _VALUE_PROBABILITY:
        value = draws.below(10)
        expression.append(value)
        return value
    if len(expression) >= limit:
        raise _TooLongError
    operator = draws.below(len(_OPERATORS))
    expression.append(_FIRST_OPERATOR + operator)
    num_arguments = 2 + draws.below(_MAX_ARGUMENTS - 1)
    values = [_grow(draws, expression, limit, levels - 1) for _ in range(num_arguments)]
    expression.append(_CLOSE)
    return _evaluate(_OPERATORS[operator], values)


def _evaluate(operator: str, values: list[int]) -> int:
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
