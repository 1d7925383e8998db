"""Causal dilated attention of sequences that come piece by piece, and never end.

A query sees keys of its own segments only, so what a stream must remember is, for each branch and
head, the keys of the current segment that the head takes part in: sum of segment_length /
dilation_rate rows per head, whatever the length of the stream. Every piece is attended exactly as
in the whole sequence.

Shape legend: b batch, n new tokens, h num_heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .pattern import DilatedPattern
from .streamed_attention import LayerKeys, Stretch

__all__ = ["StreamingCache"]


class StreamingCache:
    """What the attention layers of a causal model keep of the sequences they have read.

    Models take it as `cache`: they read the tokens that follow those read before, with the result
    of the whole sequence. For inference: no gradient flows through it.

    Args:
        pattern: The schedule of the layers.
        num_layers: How many they are.
        batch_size: Sequences that are read side by side.

    Raises:
        ValueError: If a number is below 1.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> cache = model.make_cache()
        >>> with torch.no_grad():
        ...     for chunk in tokens.split(8192, dim=1):
        ...         features = model.forward_features(chunk, cache=cache)
    """

    def __init__(self, pattern: DilatedPattern, *, num_layers: int, batch_size: int = 1) -> None:
        if not isinstance(pattern, DilatedPattern):
            raise TypeError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}.")
        for name, value in (("num_layers", num_layers), ("batch_size", batch_size)):
            if type(value) is not int:
                raise TypeError(f"{name} must be an integer, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.pattern = pattern
        self._num_layers = num_layers
        self._lengths = [0] * batch_size
        self._layers: list[LayerKeys] = []
        self.reset()

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has read."""
        return list(self._lengths)

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return len(self._lengths)

    @property
    def num_layers(self) -> int:
        """Layers that keep something."""
        return self._num_layers

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        kept = (keys for layer in self._layers for keys in layer.branches)
        return sum(x.numel() * x.element_size() for keys in kept for x in (keys.k, keys.v))

    def reset(self) -> None:
        """Forgets what was read: the next tokens are the first ones."""
        self._lengths = [0] * self.batch_size
        self._layers = [LayerKeys(self.pattern, self.batch_size) for _ in range(self._num_layers)]
        self._is_spoiled = False

    def reorder(self, rows: Tensor) -> None:
        """Takes these rows as the new batch, as beam search does.

        Args:
            rows: Numbers of rows, int64 (new_batch,); a row may come several times or not at all.

        Raises:
            TypeError: If these are no integers.
            ValueError: If a row does not exist.
        """
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
            kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows must be an int64 tensor of row numbers, got {kind}.")
        numbers = rows.tolist()
        if rows.ndim != 1 or not numbers or not all(0 <= x < self.batch_size for x in numbers):
            raise ValueError(
                f"rows must be numbers in [0, {self.batch_size}), of shape (new_batch,), got "
                f"{numbers}."
            )
        self._lengths = [self._lengths[number] for number in numbers]
        for layer in self._layers:
            layer.reorder(rows)

    def plan(self, num_tokens: Sequence[int]) -> list[Stretch]:
        """Cuts new tokens into what the layers can read at once.

        Args:
            num_tokens: How many tokens each row gets, from 0 on.

        Returns:
            Rows that stand at the same position and get as many tokens are read together; so are
            all rows that get a single one.

        Raises:
            RuntimeError: If an earlier call was interrupted.
        """
        if self._is_spoiled:
            raise RuntimeError(
                "an earlier call was interrupted when some layers had read its tokens and others "
                "had not, so what the cache keeps is of no use. Call cache.reset() and read again."
            )
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (start, length) in enumerate(zip(self._lengths, num_tokens, strict=True)):
            key = (-1, 1) if length == 1 else (start, length)
            if length:
                groups.setdefault(key, []).append(row)
        return [
            Stretch(rows=rows, starts=[self._lengths[row] for row in rows], length=length)
            for (_, length), rows in groups.items()
        ]

    @contextmanager
    def reading(self, num_tokens: Sequence[int]) -> Iterator[list[Stretch]]:
        """Counts tokens as read once all layers have read the stretches that it yields."""
        stretches = self.plan(num_tokens)
        for layer in self._layers:
            layer.has_changed = False
        try:
            yield stretches
        except BaseException:
            self._is_spoiled = any(layer.has_changed for layer in self._layers)
            raise
        self._lengths = [start + x for start, x in zip(self._lengths, num_tokens, strict=True)]

    def attention_ops(self, stretch: Stretch) -> list[Any]:
        """Makes the op of each layer that reads a stretch, with the signature of the layers' op."""
        return [partial(layer.attend, stretch=stretch) for layer in self._layers]
