"""Writes on from texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longnet_zoo.models.text_decoder import LongNetLM
from longnet_zoo.tokenizers import Tokenizer

from .checks import check_vocabulary

__all__ = ["generate_text", "printable"]

# What the bytes of a character that is not whole yet are decoded as, up to three of them.
_UNFINISHED, _MOST_OPEN = "\ufffd", 3
# Tokens of the prompt behind which new ones are read.
_CONTEXT = 8


@overload
def generate_text(model: LongNetLM, tokenizer: Tokenizer, prompts: str, **options: Any) -> str: ...


@overload
def generate_text(
    model: LongNetLM, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any
) -> list[str]: ...


def generate_text(
    model: LongNetLM,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 256,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
    **options: Any,
) -> str | list[str]:
    """Writes on from one text or several, up to the end of the document.

    Args:
        model: A causal model, in evaluation mode.
        tokenizer: The tokenizer of its text, of `longnet_zoo.tokenizers.load_tokenizer`.
        prompts: What to write on from; "" begins a document.
        max_new_tokens: Most tokens to write after a text.
        stop_strings: Texts that end the answer and are no part of it.
        on_text: Called with each stretch of text as soon as it is certain, for a single prompt.
        **options: As for `LongNetLM.generate`: `temperature`, `top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `seed`, `chunk_size`.

    Returns:
        What was written, without the prompt: a text for a text, else a list of them.

    Raises:
        ValueError: If the tokenizer has ids that the model lacks, `on_text` is given for several
            prompts, there is no prompt, or as `LongNetLM.generate`.
        TypeError: As `LongNetLM.generate`.

    Example:
        >>> model = lz.create_model("longnet_lm_tiny", pretrained=True).eval()
        >>> tokenizer = load_tokenizer("bytes")
        >>> text = generate_text(model, tokenizer, "def ", temperature=0.8, seed=0)
    """
    is_one = isinstance(prompts, str)
    if not is_one and not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"prompts must be a text or texts, got {prompts!r}.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or (on_text is not None and not is_one):
        raise ValueError(
            f"prompts must be a text or some, and a single text with on_text, got {prompts!r}."
        )
    check_vocabulary(model, tokenizer)
    special = {tokenizer.mask_id, tokenizer.pad_id} - {tokenizer.eod_id}
    prompt_ids = _encode(texts, tokenizer)
    contexts = [ids[-_CONTEXT:] for ids in prompt_ids]
    tokens, padding_mask = _padded(prompt_ids, tokenizer.eod_id)
    device = next(model.parameters()).device
    stream = None
    if on_text is not None:
        stream = _TextStream(tokenizer, stop_strings, on_text, contexts[0])
    new = model.generate(
        tokens.to(device),
        key_padding_mask=padding_mask.to(device) if padding_mask.any() else None,
        max_new_tokens=max_new_tokens,
        stop_ids=[tokenizer.eod_id],
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        banned_ids=sorted(x for x in special if x is not None),
        streamer=None if stream is None else stream.put,
        **options,
    )
    if stream is not None:
        stream.end()
    written = [
        _before(_text_behind(context, row, tokenizer), stop_strings)
        for context, row in zip(contexts, new.tolist(), strict=True)
    ]
    return written[0] if is_one else written


def printable(text: str) -> str:
    """Replaces what could move a terminal's cursor or is no text by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Turns texts into token ids; what follows the end of a document begins another."""
    # Bytes of a command line that are no UTF-8 have become surrogates.
    encoded = tokenizer.encode_batch([text.encode(errors="surrogateescape") for text in texts])
    return [ids.tolist() or [tokenizer.eod_id] for ids in encoded]


def _padded(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Makes a right-padded batch, (b, t), and its padding mask."""
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) >= lengths[:, None]


def _text_behind(context: list[int], ids: list[int], tokenizer: Tokenizer) -> str:
    """Decodes tokens as they read behind others."""
    return tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]


class _TextStream:
    """Says text as it comes: whole characters, and nothing that may begin a stop string.

    The text of a token depends on the one before it for some tokenizers, so tokens are read behind
    some of the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        on_text: Callable[[str], object],
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._stop_strings, self._on_text = tokenizer, stop_strings, on_text
        self._context, self._pending = list(context), list[int]()
        # Of the text of both, what is certain; and of that, what is not said yet.
        self._num_read = len(tokenizer.decode(self._context))
        self._held = ""

    def put(self, tokens: Tensor) -> None:
        self._pending.append(int(tokens[0]))
        text = self._tokenizer.decode([*self._context, *self._pending])
        num_open = min(len(text) - len(text.rstrip(_UNFINISHED)), _MOST_OPEN)
        self._read(text[: len(text) - num_open])
        if not num_open:
            self._context, self._pending = self._pending, []
            self._num_read = len(self._tokenizer.decode(self._context))

    def end(self) -> None:
        self._read(self._tokenizer.decode([*self._context, *self._pending]))
        if self._held:
            self._on_text(self._held)

    def _read(self, text: str) -> None:
        new, self._num_read = text[self._num_read :], max(self._num_read, len(text))
        text = _before(self._held + new, self._stop_strings)
        held = 0
        if text == self._held + new:
            held = max((_begun(text, string) for string in self._stop_strings), default=0)
        certain, self._held = text[: len(text) - held], text[len(text) - held :]
        if certain:
            self._on_text(certain)


def _begun(text: str, string: str) -> int:
    """Counts the characters at the end of a text that a string begins with, less than all."""
    sizes = range(len(string) - 1, 0, -1)
    return next((size for size in sizes if text.endswith(string[:size])), 0)


def _before(text: str, stop_strings: Sequence[str]) -> str:
    """Cuts a text before the first stop string."""
    return text[: min((text.index(x) for x in stop_strings if x in text), default=len(text))]
