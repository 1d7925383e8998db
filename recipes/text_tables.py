"""Reads documents from the rows of `.jsonl` and `.parquet` files with Hugging Face `datasets`.

Files are streamed, so that no copy in Arrow format is written and memory does not grow with the
file; nothing is looked up in the network.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["TABLE_SUFFIXES", "ColumnError", "read_rows"]

TABLE_SUFFIXES = (".jsonl", ".parquet")


class ColumnError(ValueError):
    """The column of a table that should hold the text is missing or holds something else."""


def read_rows(path: Path, column: str, *, start: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """Yields the rows of a table from row `start` on.

    Args:
        path: A `.jsonl` or `.parquet` file.
        column: Column that holds the text.
        start: First row, counted from 0.

    Yields:
        Row number and text in UTF-8; None where the row has no text.

    Raises:
        ColumnError: There is no such column, or it holds something other than text.
        OSError: The file cannot be read.
        ValueError: The file is damaged.
        RuntimeError: The package `datasets` is not installed.
    """
    # An empty file has no columns that `datasets` could infer.
    if path.stat().st_size == 0:
        return
    # Only a lock file goes to the cache folder.
    with tempfile.TemporaryDirectory(prefix="longnet_zoo_datasets_") as cache_dir:
        table = _open(path, column, cache_dir)
        for row, record in enumerate(table.skip(start), start):
            value = record[column]
            if isinstance(value, str):
                value = value.encode("utf-8", errors="replace")
            elif value is not None and not isinstance(value, bytes):
                raise ColumnError(
                    f"column={column!r} must hold text, got {type(value).__name__} in row {row} of "
                    f"{path}. Pass column=<the one that holds the documents>."
                )
            yield row, value


def _open(path: Path, column: str, cache_dir: str) -> Any:
    """Opens a table as a stream of records that hold the one column."""
    try:
        from datasets import Dataset
    except ImportError as error:
        raise RuntimeError(
            f"reading {path} needs the package datasets. Install it with `pip install datasets`."
        ) from error
    read = Dataset.from_json if path.suffix.lower() == ".jsonl" else Dataset.from_parquet
    table = read(str(path), streaming=True, cache_dir=cache_dir)
    columns = table.column_names or list(next(iter(table), {}))
    if column not in columns:
        raise ColumnError(
            f"column={column!r} must be a column of {path}, which has {sorted(columns)}. Pass "
            "column=<the one that holds the documents>."
        )
    return table.select_columns([column])
