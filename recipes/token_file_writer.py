"""Writes the text of any source as files of token ids, for `recipes.token_file`.

    python -m recipes.token_file_writer --source python --folder tokens
    python -m recipes.token_file_writer --source 'the-stack/data/**/*.parquet' --column content \
        --tokenizer cl100k_base/tokenizer.json --folder tokens

It writes `train.npy`, `val.npy` and `test.npy`, and never holds more than a few documents. These
follow each other, each closed by the tokenizer's end-of-document id; the splits are those that
`recipes.text_data` makes when streaming, duplicates included.
"""

from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from jsonargparse import auto_cli

from longnet_zoo.tokenizers import Tokenizer, load_tokenizer
from recipes.cli import report_error
from recipes.text_corpus import Corpus, Split
from recipes.text_packing import DocumentEncoder

__all__ = ["main", "write_token_files"]


def write_token_files(
    *,
    folder: str,
    source: list[str] | str = "stdlib",
    val_source: list[str] | str | None = None,
    test_source: list[str] | str | None = None,
    pattern: str | None = None,
    column: str = "text",
    val_fraction: float = 0.1,
    test_fraction: float = 0.05,
    on_error: Literal["skip", "raise"] = "skip",
    tokenizer: str = "bytes",
    max_document_bytes: int = 8_388_608,
) -> dict[str, int]:
    """Writes a .npy file of token ids for each split.

    Args:
        folder: Where to write; made if there is none.
        source: Documents, as in `recipes.text_data`: "stdlib", "python", a folder, a file, a glob,
            or a list of these.
        val_source: Validation documents; null holds out `val_fraction` of `source`.
        test_source: Test documents; null holds out `test_fraction` of `source`.
        pattern: Glob of the files to take, relative to each folder; null takes the known suffixes.
        column: Column of tables that holds the text.
        val_fraction: Share of documents held out for validation; 0 for none.
        test_fraction: Share of documents held out for the test; 0 for none.
        on_error: "skip" logs files that cannot be read and goes on; "raise" stops at them.
        tokenizer: "bytes", or the path of a tokenizer.json or of its folder.
        max_document_bytes: Text files longer than this, in bytes, are cut into documents.

    Returns:
        Tokens written, by the path of the file.

    Raises:
        ValueError: The source or the tokenizer cannot be read, the folder cannot be written, or a
            split is empty.
    """
    made = load_tokenizer(tokenizer)
    corpus = Corpus(
        source=source,
        val_source=val_source,
        test_source=test_source,
        pattern=pattern,
        column=column,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        on_error=on_error,
    )
    splits: list[Split] = ["train"]
    splits += ["val"] if val_source or val_fraction else []
    splits += ["test"] if test_source or test_fraction else []
    paths = {split: Path(folder, f"{split}.npy") for split in splits}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"folder must be one that can be made, got {folder!r}: {error}. Pass another path."
        ) from error
    return {
        str(path): _write(path, corpus, split, made, max_document_bytes)
        for split, path in paths.items()
    }


def _write(
    path: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, max_document_bytes: int
) -> int:
    """Writes one split and returns its tokens; the file appears when it is complete."""
    encoder = DocumentEncoder[None](tokenizer)
    num_tokens, unfinished = 0, path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        _write_header(file, 0, tokenizer.dtype)
        start = file.tell()
        for document in corpus.split_documents(split, max_document_bytes=max_document_bytes):
            for _, ids in encoder.add(None, document.text):
                num_tokens += file.write(ids.tobytes()) // ids.itemsize
        for _, ids in encoder.finish():
            num_tokens += file.write(ids.tobytes()) // ids.itemsize
        file.seek(0)
        _write_header(file, num_tokens, tokenizer.dtype)
        # NumPy leaves room for a larger number, so that the header can be written again.
        assert file.tell() == start
    if not num_tokens:
        unfinished.unlink()
        raise ValueError(
            f"the {split} split must hold text, got none. Raise {split}_fraction or pass "
            f"{split}_source; a fraction of 0 leaves the split out."
        )
    unfinished.rename(path)
    return num_tokens


def _write_header(file: BinaryIO, num_tokens: int, dtype: np.dtype) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    try:
        written = auto_cli(write_token_files, args=args, as_positional=False)
    except Exception as error:
        report_error(error)
    for path, num_tokens in written.items():
        print(f"{path}: {num_tokens:,} tokens")


if __name__ == "__main__":
    main()
