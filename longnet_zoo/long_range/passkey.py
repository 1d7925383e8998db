"""Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300): a number hidden in text.

Tokens are bytes. The text says that something important is hidden, then come filler sentences with
the pass key among them, and at the end the question. Key, wording, filler and line breaks are those
of the published prompt (landmark-attention, `llama/run_test.py`), with a space behind the question
and then the key. The filler before the key and that behind it each begin anew, as published, and
are cut so that every example has its exact length.

A causal model reads the digits of the key as it says them, and is right if it is right about every
one of them. From a model that sees both sides they are hidden by `mask_id`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .task import IGNORE_INDEX, Example, Task, check_number, check_range

__all__ = ["Passkey"]

_LARGEST_KEY = 50_000
_TASK = (
    b"There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    b"them. I will quiz you about the important information there.\n"
)
_FILLER = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_KEY = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = b"\nWhat is the pass key? The pass key is "
_SHORTEST = 320


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Options of passkey retrieval.

    Attributes:
        seq_len: Bytes of an example.
        depth: Where the key lies, from 0 (before all filler) to 1 (behind it); None: anywhere.
    """

    seq_len: int = 1024
    depth: float | None = None

    name: ClassVar[str] = "passkey"
    scores_whole: ClassVar[bool] = True
    # Of the byte vocabulary; see `longnet_zoo.tokenizers`.
    mask_id: ClassVar[int | None] = 257

    def __post_init__(self) -> None:
        check_range("seq_len", self.seq_len, least=_SHORTEST, cure="The question needs the room.")
        if self.depth is not None:
            check_number("depth", self.depth)
            if not 0 <= self.depth <= 1:
                raise ValueError(f"depth must be None or in [0, 1], got {self.depth}.")

    @property
    def vocab_size(self) -> int:
        """The bytes and the three special tokens of `longnet_zoo.tokenizers`."""
        return 259

    @property
    def num_labels(self) -> int:
        """The digits of the longest key."""
        return len(str(_LARGEST_KEY))

    @property
    def chance(self) -> float:
        """A guess among all keys."""
        return 1 / _LARGEST_KEY

    def draw(self, rng: np.random.Generator) -> Example:
        """Draws an example."""
        key = str(rng.integers(1, _LARGEST_KEY + 1))
        hint = _KEY.format(key=key).encode()
        # The last digit is no input, so the text is one byte longer than the sequence.
        room = self.seq_len + 1 - len(_TASK + hint + _QUESTION) - len(key)
        depth = rng.random() if self.depth is None else self.depth
        before = round(depth * room)
        text = b"".join(
            [_TASK, _filler(before), hint, _filler(room - before), _QUESTION, key.encode()]
        )
        whole = np.frombuffer(text, np.uint8).astype(np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX)
        labels[-len(key) :] = whole[-len(key) :]
        return Example(whole[:-1], labels)


def _filler(num_bytes: int) -> bytes:
    return (_FILLER * (num_bytes // len(_FILLER) + 1))[:num_bytes]
