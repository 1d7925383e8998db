"""Turns the splits of a corpus into token streams: held in memory, cut off a tail, or a part."""

import warnings
from collections.abc import Sequence

import numpy as np

from .text_corpus import Corpus, Split
from .text_packing import PackedDocuments, Packer
from .tokenizers import Tokenizer

__all__ = ["cut_tail", "pack_front", "pack_splits"]


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
