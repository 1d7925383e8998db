"""Reads the splits of a corpus as token streams: whole, cut off the end, or the front."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from longnet_zoo.tokenizers import Tokenizer

from .text_corpus import Corpus, CorpusSummary, Split
from .text_packing import Objective, PackedDocuments, Packer, window_size
from .text_streaming import StreamingConfig

__all__ = ["SplitReader", "cut_tail", "pack_front", "pack_splits"]

_CURES = {
    "train": "add text, lower val_fraction and test_fraction",
    "val": "raise val_fraction, pass val_source",
    "test": "raise test_fraction, pass test_source",
}


class SplitReader:
    """Reads splits of a corpus into memory, and knows what it has read.

    Args:
        tokenizer: Makes the ids.
        corpus_options: Arguments of `Corpus`, all of them.
        is_tail: Whether held-out splits are the end of the text instead of whole documents.
        streaming: How the training text is streamed; None holds it in memory. With it held-out
            text is only the front of the corpus.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        corpus_options: dict[str, Any],
        is_tail: bool,
        streaming: StreamingConfig | None,
    ) -> None:
        self.summary: CorpusSummary | None = None
        self._tokenizer = tokenizer
        self._options = corpus_options
        self._is_tail = is_tail
        self._streaming = streaming
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the text and its splits."""
        if self._fingerprint is None:
            raise RuntimeError("fingerprint needs the corpus to have been read: call setup first.")
        return self._fingerprint

    def has(self, split: Split) -> bool:
        """Returns whether there is to be such a split."""
        if split == "train":
            return True
        return self._has_source(split) or self._options[f"{split}_fraction"] > 0

    def open_corpus(self) -> Corpus:
        """Finds the files of the corpus."""
        whole = {"val_fraction": 0.0, "test_fraction": 0.0} if self._is_tail else {}
        corpus = Corpus(**{**self._options, **whole})
        if self._streaming:
            self._fingerprint = corpus.file_fingerprint()
        return corpus

    def read(
        self, splits: Sequence[Split], *, seq_len: int, objective: Objective
    ) -> dict[Split, PackedDocuments]:
        """Reads splits.

        Args:
            splits: Which ones.
            seq_len: Context in tokens.
            objective: What the windows are for.

        Returns:
            Their token streams, each of a window or more, and possibly those of other splits.

        Raises:
            ValueError: A split does not fill a window.
        """
        corpus = self.open_corpus()
        packed = self._read_front(corpus, splits) if self._streaming else self._read(corpus, splits)
        said = self.summary or f"streaming, files {self._fingerprint}"
        rank_zero_info(f"text from {self._options['source']!r}: {said}")
        if self._is_tail:
            packed = self._cut_tail(packed)
        for split in splits:
            self._check_size(split, packed[split], seq_len=seq_len, objective=objective)
        return packed

    def _read_front(self, corpus: Corpus, splits: Sequence[Split]) -> dict[Split, PackedDocuments]:
        assert self._streaming is not None
        limits = {
            "max_tokens": self._streaming.eval_tokens,
            "max_document_bytes": self._streaming.max_document_bytes,
        }
        return {split: pack_front(corpus, split, self._tokenizer, **limits) for split in splits}

    def _read(self, corpus: Corpus, splits: Sequence[Split]) -> dict[Split, PackedDocuments]:
        every: tuple[Split, ...] = ("train", "val", "test")
        if self._is_tail:
            # It is cut off the training text, so whichever split is asked for, all are read.
            splits = [split for split in every if self.has(split) or split in splits]
        packed = pack_splits(corpus, splits, self._tokenizer)
        self.summary = corpus.summary
        self._fingerprint = self.summary.fingerprint
        return packed

    def _cut_tail(self, packed: dict[Split, PackedDocuments]) -> dict[Split, PackedDocuments]:
        held_out: tuple[Split, ...] = ("val", "test")
        fractions: dict[Split, float] = {
            split: 0.0 if self._has_source(split) else self._options[f"{split}_fraction"]
            for split in held_out
        }
        # The text is the same wherever it is cut, but not the figures.
        name = f"{self._fingerprint}:{sorted(fractions.items())}"
        self._fingerprint = hashlib.sha256(name.encode()).hexdigest()[:12]
        return cut_tail(packed, fractions, self._tokenizer)

    def _has_source(self, split: Split) -> bool:
        return self._options[f"{split}_source"] is not None

    def _check_size(
        self, split: Split, packed: PackedDocuments, *, seq_len: int, objective: Objective
    ) -> None:
        needed = window_size(seq_len, objective)
        if packed.num_tokens >= needed:
            return
        can_cut = not self._is_tail and not self._streaming
        tail = ", or hold out the end of the text by data.split tail" if can_cut else ""
        raise ValueError(
            f"the {split} split must fill a window of {needed:,} tokens (seq_len={seq_len}), "
            f"got {packed.num_tokens:,} tokens in {packed.num_documents:,} documents from "
            f"source={self._options['source']!r}. Shorten seq_len, {_CURES[split]}{tail}."
        )


def pack_splits(
    corpus: Corpus, splits: Sequence[Split], tokenizer: Tokenizer
) -> dict[Split, PackedDocuments]:
    """Reads the whole corpus and tokenizes some of its splits.

    Args:
        corpus: Where the documents come from.
        splits: Splits to tokenize.
        tokenizer: Makes the ids.

    Returns:
        The token streams, which may be empty.
    """
    packers = {split: Packer(tokenizer) for split in splits}
    for split, document in corpus.documents():
        if split in packers:
            packers[split].add(document.text)
    packed = {split: packer.finish() for split, packer in packers.items()}
    for stream in packed.values():
        _check_bytes(stream, tokenizer)
    return packed


def cut_tail(
    packed: dict[Split, PackedDocuments], fractions: dict[Split, float], tokenizer: Tokenizer
) -> dict[Split, PackedDocuments]:
    """Cuts held-out splits off the end of the training stream, the test last.

    Args:
        packed: Token streams.
        fractions: Share of the training stream for "val" and "test"; 0 leaves that split alone.
        tokenizer: Tells how many bytes the tokens stand for.

    Returns:
        The token streams of all splits.
    """
    stream = packed["train"]
    num_test = int(stream.num_tokens * fractions["test"])
    num_val = int(stream.num_tokens * fractions["val"])
    test_start = stream.num_tokens - num_test
    val_start = test_start - num_val
    cut = dict(packed)
    cut["train"] = stream.part(0, val_start, tokenizer)
    if fractions["val"] > 0:
        cut["val"] = stream.part(val_start, test_start, tokenizer)
    if fractions["test"] > 0:
        cut["test"] = stream.part(test_start, stream.num_tokens, tokenizer)
    return cut


def pack_front(
    corpus: Corpus,
    split: Split,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    max_document_bytes: int,
) -> PackedDocuments:
    """Reads a split from the front of the corpus until there are enough tokens.

    Args:
        corpus: Where the documents come from.
        split: Split to read.
        tokenizer: Makes the ids.
        max_tokens: Tokens to take, at most.
        max_document_bytes: Cuts longer text files into documents of about this size.

    Returns:
        The token stream.
    """
    packer = Packer(tokenizer)
    for document in corpus.split_documents(split, max_document_bytes=max_document_bytes):
        packer.add(document.text)
        if packer.num_tokens >= max_tokens:
            break
    stream = packer.finish()
    _check_bytes(stream, tokenizer)
    return stream.part(0, min(stream.num_tokens, max_tokens), tokenizer)


def _check_bytes(stream: PackedDocuments, tokenizer: Tokenizer) -> None:
    """Warns if a tokenizer loses text, since bits per byte are then not what they say."""
    counts = np.bincount(stream.tokens, minlength=tokenizer.vocab_size)
    counted = int(counts @ tokenizer.token_bytes.numpy())
    if abs(counted - stream.num_bytes) > 0.01 * stream.num_bytes:
        warnings.warn(
            f"the tokens stand for {counted:,} bytes by token_bytes, and the text has "
            f"{stream.num_bytes:,}: this tokenizer drops or changes text, so bits per byte come "
            f"out {stream.num_bytes / max(1, counted):.3f} times what they are per byte of text. "
            "Compare them only between runs with this tokenizer.",
            stacklevel=2,
        )
