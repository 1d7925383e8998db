"""Turns text into token ids: raw bytes, or any Hugging Face `tokenizer.json`.

Both kinds offer the same attributes and methods (`Tokenizer`), so data modules, metrics and
sampling need not know which one is used. Byte vocabulary: ids 0-255 are the bytes, 256 ends a
document, 257 masks, 258 pads.

`token_bytes[i]` is the number of bytes of text that id `i` stands for (0 for special tokens).
Bits per byte over some labels is `sum(loss in nats) / log(2) / token_bytes[labels].sum()`, which
compares models whatever their vocabulary.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["ByteTokenizer", "JsonTokenizer", "Tokenizer", "load_tokenizer"]

# Names in published tokenizers, the most telling first: a GPT-2 vocabulary has only the first,
# a BERT one only "[SEP]".
_EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "<eod>",
    "<|eod|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|im_end|>",
    "<EOT>",
    "[EOS]",
    "[SEP]",
)
_MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>", "<MASK>")
_PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<PAD>", "<|finetune_right_pad_id|>")


class Tokenizer(Protocol):
    """What is asked of a tokenizer.

    Attributes:
        vocab_size: Number of token ids, special ones included; the model needs as many.
        eod_id: Id written after every document.
        mask_id: Id that hides a token in masked language modelling; None where there is none.
        pad_id: Id that fills up; None where there is none.
        dtype: Smallest numpy integer type that holds every id.
        token_bytes: Bytes of text that each id stands for, int64, (vocab_size,).
        regular_ids: Ids that stand for text, int64, (num_regular,).
    """

    vocab_size: int
    eod_id: int
    mask_id: int | None
    pad_id: int | None
    dtype: np.dtype
    token_bytes: Tensor
    regular_ids: np.ndarray

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, leaving out special tokens."""
        ...


def load_tokenizer(
    name: str,
    *,
    eod_token: str | None = None,
    mask_token: str | None = None,
    pad_token: str | None = None,
) -> Tokenizer:
    """Makes the tokenizer that `name` asks for.

    Args:
        name: "bytes", or the path of a `tokenizer.json` or of the folder that holds one.
        eod_token: Token that ends a document, as written in the vocabulary; None looks for a
            common name such as "<|endoftext|>" or "</s>".
        mask_token: Token that hides others; None looks for a common name such as "[MASK]".
        pad_token: Token that fills up; None looks for a common name such as "[PAD]".

    Returns:
        The tokenizer.

    Raises:
        ValueError: There is no such file, it is damaged, or it lacks a token that is needed.
    """
    chosen = {"eod_token": eod_token, "mask_token": mask_token, "pad_token": pad_token}
    if name != "bytes":
        return JsonTokenizer(name, **chosen)
    given = {option: value for option, value in chosen.items() if value is not None}
    if given:
        raise ValueError(
            f"tokenizer='bytes' has fixed special tokens, got {given}. Leave these options out, "
            "or pass the path of a tokenizer.json."
        )
    return ByteTokenizer()


class ByteTokenizer:
    """Takes every byte as a token: nothing to ship, nothing unknown."""

    vocab_size = 259
    eod_id = 256
    mask_id: int | None = 257
    pad_id: int | None = 258
    dtype = np.dtype(np.uint16)

    def __init__(self) -> None:
        self.token_bytes = (torch.arange(self.vocab_size) < 256).long()
        self.regular_ids = np.arange(256)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the bytes of each text as uint16 ids."""
        return [np.frombuffer(text, np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """Wraps the fast tokenizer that a `tokenizer.json` describes.

    Special tokens that happen to be spelt out in a text are read as plain characters, so that a
    document cannot end itself, and truncation and padding of the file are switched off.

    Args:
        path: The `tokenizer.json`, or the folder that holds one.
        eod_token: Token that ends a document; None looks for a common name.
        mask_token: Token that hides others; None looks for a common name.
        pad_token: Token that fills up; None looks for a common name.

    Raises:
        ValueError: The file is missing or damaged, or a token is not in the vocabulary.
        RuntimeError: The package `tokenizers` is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        eod_token: str | None = None,
        mask_token: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        self._tokenizer = _read(path)
        spec = json.loads(self._tokenizer.to_str())
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}

        # Ids may have gaps, so the highest one counts and not their number.
        self.vocab_size = max(vocab.values(), default=-1) + 1
        eod_id = _token_id("eod_token", eod_token, _EOD_NAMES, vocab)
        if eod_id is None:
            raise ValueError(
                f"eod_token must name the token that ends a document, and {path} has none of the "
                f"common names. Its special tokens are {sorted(special) or 'none'}. Pass "
                "eod_token=..., or add such a token to the file."
            )
        self.eod_id = eod_id
        self.mask_id = _token_id("mask_token", mask_token, _MASK_NAMES, vocab)
        self.pad_id = _token_id("pad_token", pad_token, _PAD_NAMES, vocab)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.int32)

        reserved = {vocab[token] for token in special} | {self.eod_id, self.mask_id, self.pad_id}
        regular = {token: i for token, i in vocab.items() if i not in reserved}
        self.regular_ids = np.array(sorted(regular.values()), np.int64)
        self.token_bytes = _token_bytes(regular, spec, self.vocab_size)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each text; bytes that are no UTF-8 are read as U+FFFD."""
        strings = [text.decode("utf-8", errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, leaving out special tokens."""
        reserved = {self.eod_id, self.mask_id, self.pad_id}
        return self._tokenizer.decode([int(i) for i in ids if int(i) not in reserved])


def _read(path: str | Path) -> Any:
    """Reads the file with special tokens, truncation and padding switched off."""
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(
            f"tokenizer={str(path)!r} needs the package tokenizers. Install it with "
            "`pip install tokenizers`, or pass tokenizer='bytes'."
        ) from error
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"tokenizer must be 'bytes' or the path of a tokenizer.json, got {str(path)!r}: there "
            f"is no file {file}."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    # The package raises plain Exception for whatever it does not understand.
    except Exception as error:
        raise ValueError(
            f"{file} is no readable tokenizer.json: {error}. Save it again with "
            "tokenizers.Tokenizer.save, or pass tokenizer='bytes'."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _token_id(
    option: str, token: str | None, names: tuple[str, ...], vocab: dict[str, int]
) -> int | None:
    """Returns the id of the token chosen, or of the first common name in the vocabulary."""
    if token is None:
        return next((vocab[name] for name in names if name in vocab), None)
    if token not in vocab:
        raise ValueError(
            f"{option} must be in the vocabulary of the tokenizer, got {token!r}, which is none of "
            f"its {len(vocab)} tokens. Pass a token as it is written in tokenizer.json."
        )
    return vocab[token]


def _token_bytes(regular: dict[str, int], spec: dict[str, Any], vocab_size: int) -> Tensor:
    """Returns how many bytes of text each id stands for; 0 for ids that are not in `regular`."""
    added = {entry["content"] for entry in spec["added_tokens"]}
    kinds = _types(spec["decoder"]) | _types(spec["pre_tokenizer"])
    prefix = spec["model"].get("continuing_subword_prefix") or ""
    suffix = spec["model"].get("end_of_word_suffix") or ""

    def count(token: str) -> int:
        if token in added:
            return len(token.encode())
        if "ByteLevel" in kinds:
            # GPT-2's alphabet writes each byte as one character.
            return len(token)
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return 1
        text = token.removeprefix(prefix)
        # An end of word stands for the space behind it, SentencePiece's "▁" for the one before.
        text = text.removesuffix(suffix) + " " if suffix and text.endswith(suffix) else text
        return len(text.replace("\u2581", " ").encode())

    sizes = np.zeros(vocab_size, np.int64)
    for token, i in regular.items():
        sizes[i] = count(token)
    return torch.from_numpy(sizes)


def _types(part: Any) -> set[str]:
    """Returns the types of a decoder or pre-tokenizer and of all parts it is made of."""
    if isinstance(part, dict):
        own = {part["type"]} if "type" in part else set()
        return own.union(*(_types(value) for value in part.values()))
    return set().union(*(_types(value) for value in part)) if isinstance(part, list) else set()
