"""Trains a tokenizer on the text of any source and writes it as a `tokenizer.json`.

    python -m recipes.tokenizer_trainer --source 'code/**/*.py' --vocab_size 16384 \
        --output code/tokenizer.json
    python -m recipes.tokenizer_trainer --source icons --vocab_size 2048 \
        --output recipes/assets/icons/tokenizer.json

Byte-level BPE (arXiv 1508.07909 on bytes, as in GPT-2): nothing is unknown to it, and words that
are frequent in the source become one token. The same source gives the same file.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from recipes.cli import report_error
from recipes.icons import COLOURS, load_icons, split_icons
from recipes.text_corpus import Corpus

__all__ = ["main", "train_tokenizer"]

# By these names `longnet_zoo.tokenizers` knows them: end of document, mask, padding.
_SPECIAL = ("<eod>", "<mask>", "<pad>")
# The bytes and the special tokens.
_LEAST_VOCAB = 256 + len(_SPECIAL)
_DOCUMENT_BYTES = 1 << 20


def train_tokenizer(
    *,
    output: str,
    source: list[str] | str,
    vocab_size: int,
    pattern: str | None = None,
    column: str = "text",
    val_fraction: float = 0.1,
    test_fraction: float = 0.05,
) -> int:
    """Trains a tokenizer on the training split of a source.

    Args:
        output: File to write, a `.json`; its folder is made if there is none.
        source: "icons" (names of the icons that `recipes.image_text` trains on, with its colours),
            or documents as in `recipes.text_data`.
        vocab_size: Number of token ids, the 256 bytes and three special ones among them.
        pattern: Glob of the files to take, relative to each folder; null takes the known suffixes.
        column: Column of tables that holds the text.
        val_fraction: Share of documents held out for validation, which are not read.
        test_fraction: Share of documents held out for the test, which are not read.

    Returns:
        The number of token ids, fewer than `vocab_size` for a small source.

    Raises:
        ValueError: An option is out of range, the source cannot be read or holds no text, or the
            file cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _LEAST_VOCAB:
        raise ValueError(
            f"vocab_size must be at least {_LEAST_VOCAB}, the bytes and three special tokens, got "
            f"{vocab_size}."
        )
    if Path(output).suffix != ".json":
        raise ValueError(f"output must end in .json, got {output!r}.")
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    texts = _names() if source == "icons" else _documents(source, pattern, column, **fractions)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == _LEAST_VOCAB < vocab_size:
        raise ValueError(f"source must hold text that repeats itself, got none in {source!r}.")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"output must be a file that can be written, got {output!r}: {error}. Pass another."
        ) from error
    return tokenizer.get_vocab_size()


def _names() -> Iterator[str]:
    """Captions as in training: half of them begin with a colour."""
    for icon, colour in zip(split_icons(load_icons())["train"], cycle(COLOURS)):
        yield icon.caption
        yield f"{colour} {icon.caption}"


def _documents(
    source: list[str] | str, pattern: str | None, column: str, **fractions: Any
) -> Iterator[str]:
    corpus = Corpus(source=source, pattern=pattern, column=column, **fractions)
    for document in corpus.split_documents("train", max_document_bytes=_DOCUMENT_BYTES):
        yield bytes(document.text).decode(errors="replace")


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    try:
        num_ids = auto_cli(train_tokenizer, args=args, as_positional=False)
    except Exception as error:
        report_error(error)
    print(f"{num_ids:,} token ids: pass it as --data.tokenizer, and this as vocab_size")


if __name__ == "__main__":
    main()
