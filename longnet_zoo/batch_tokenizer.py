"""Texts to padded batches of token ids, in the way open_clip's users expect."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from longnet_zoo.registry import find_model
from longnet_zoo.tokenizers import Tokenizer, load_tokenizer

__all__ = ["BatchTokenizer", "OnLong", "get_tokenizer"]

OnLong = Literal["truncate", "raise"]


def get_tokenizer(
    name: str,
    *,
    file: str | os.PathLike[str] | None = None,
    context_length: int | None = None,
    on_long: OnLong = "truncate",
) -> BatchTokenizer:
    """Makes the tokenizer of a registered image-text model, to be called as open_clip's are.

    Args:
        name: The model.
        file: A `tokenizer.json`, or the folder that holds one; None: bytes. The model then needs
            the options `text={"vocab_size": tokenizer.vocab_size}` and `pad_id=tokenizer.pad_id`.
        context_length: Tokens of the longest text, its end included; None: `max_text_len` of the
            model.
        on_long: What happens to longer texts; see `BatchTokenizer`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If the name is unknown or that of another kind of model, the file is damaged,
            or an option is outside its range.
        TypeError: If `context_length` is not an integer.

    Example:
        >>> tokenizer = get_tokenizer("longnet_clip_tiny")
        >>> tokens = tokenizer(["a red circle", "a photo of a cat"])  # int64 (2, 17)
    """
    entry = find_model(name)
    if entry.modality != "image-text":
        raise ValueError(
            f"get_tokenizer is for image-text models, got {name!r}, a {entry.modality} model. "
            "Use load_tokenizer for documents."
        )
    tokenizer = load_tokenizer("bytes" if file is None else os.fspath(file))
    limit = entry.config.max_text_len if context_length is None else context_length
    return BatchTokenizer(tokenizer, context_length=limit, on_long=on_long)


class BatchTokenizer:
    """Turns texts into one padded batch of token ids, each with an end token behind it.

    Texts are taken as they are: nothing is lower-cased or stripped. An empty text is its end token
    alone. A longer text than `context_length` keeps its beginning and still gets its end token,
    `num_truncated` counts such texts, and the first of them causes a warning; `on_long="raise"`
    refuses them. A call pads to its longest text only, since thousands of tokens of padding would
    cost as much as text; where the call names a `context_length`, it pads to that, as open_clip.

    Args:
        tokenizer: Makes the ids. Where it has no padding token, the next free id pads.
        context_length: Tokens of the longest text, its end included.
        on_long: "truncate" or "raise".

    Raises:
        ValueError: If an option is outside its range.
        TypeError: If `context_length` is not an integer.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, context_length: int, on_long: OnLong = "truncate"
    ) -> None:
        _check_length(context_length)
        if on_long not in get_args(OnLong):
            raise ValueError(f"on_long must be one of {get_args(OnLong)}, got {on_long!r}.")
        self.tokenizer, self.context_length, self.on_long = tokenizer, context_length, on_long
        self.pad_id = tokenizer.vocab_size if tokenizer.pad_id is None else tokenizer.pad_id
        self.vocab_size = max(tokenizer.vocab_size, self.pad_id + 1)
        self.num_truncated = 0

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Makes ids, int64 (batch, longest text), or (batch, context_length) if that is given.

        Args:
            texts: One text or several.
            context_length: Length of the result, for this call; None: that of the longest text, at
                most `context_length` of the tokenizer.

        Raises:
            ValueError: If there is no text, or one is too long and `on_long="raise"`.
            TypeError: If a text is not a string, or `context_length` not an integer.
        """
        texts = _listed(texts)
        limit = self.context_length
        if context_length is not None:
            limit = _check_length(context_length)
        # Half of a surrogate pair is no text; it becomes "?".
        rows = self.tokenizer.encode_batch([text.encode(errors="replace") for text in texts])
        self._check_long([len(row) + 1 for row in rows], limit)
        rows = [row[: limit - 1] for row in rows]
        width = max(map(len, rows)) + 1 if context_length is None else limit
        tokens = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = torch.from_numpy(row.astype(np.int64))
            place[len(row)] = self.tokenizer.eod_id
        return tokens

    def decode(self, tokens: Tensor) -> str | list[str]:
        """Returns the text of a row (seq_len,), or those of a batch (batch, seq_len)."""
        if tokens.ndim == 2:
            return [self._decode_row(row) for row in tokens]
        return self._decode_row(tokens)

    def _decode_row(self, row: Tensor) -> str:
        return self.tokenizer.decode(row[row != self.pad_id].tolist())

    def _check_long(self, lengths: list[int], limit: int) -> None:
        too_long = [length for length in lengths if length > limit]
        if not too_long:
            return
        found = (
            f"{len(too_long)} of {len(lengths)} texts are longer than context_length={limit} "
            f"tokens, the longest has {max(too_long)} with its end"
        )
        if self.on_long == "raise":
            raise ValueError(f"{found}. Shorten them, or pass on_long='truncate'.")
        if not self.num_truncated:
            warnings.warn(
                f"{found}: what lies behind is cut off. num_truncated counts such texts; this "
                "warning is given once.",
                UserWarning,
                stacklevel=3,
            )
        self.num_truncated += len(too_long)


def _check_length(context_length: int) -> int:
    if type(context_length) is not int:
        raise TypeError(f"context_length must be an integer, got {context_length!r}.")
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}.")
    return context_length


def _listed(given: str | Iterable[str]) -> list[str]:
    if not isinstance(given, Iterable):
        raise TypeError(f"texts must be a string or several, got {given!r}.")
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise ValueError("texts must hold at least one text, got none.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"texts must be strings, got {text!r} ({type(text).__name__}) as number {i}."
            )
    return texts
