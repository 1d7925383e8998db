"""Reads documents from the rows of `.jsonl` and `.parquet` files, a few at a time.

A damaged row of a `.jsonl` file costs that row only. `.parquet` files are read by Hugging Face
`datasets`, streamed, so that no copy in Arrow format is written; nothing is looked up in the
network.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["TABLE_SUFFIXES", "ColumnError", "RowError", "read_rows"]

TABLE_SUFFIXES = (".jsonl", ".parquet")

# After so many objects without the column it is not called that way.
_SAMPLE = 100


class ColumnError(ValueError):
    """The column of a table that should hold the text is missing or holds something else."""


class RowError(ValueError):
    """A row of a table cannot be read."""


def read_rows(
    path: Path, column: str, *, start: int = 0
) -> Iterator[tuple[int, bytes | RowError | None]]:
    """Yields the rows of a table from row `start` on.

    Args:
        path: A `.jsonl` or `.parquet` file.
        column: Column that holds the text.
        start: First row, counted from 0.

    Yields:
        Row number and text in UTF-8; None where the row has no text, an error where it is damaged.

    Raises:
        ColumnError: There is no such column, or it holds something other than text.
        OSError: The file cannot be read.
        ValueError: The file is damaged.
        RuntimeError: The package `datasets` is not installed.
    """
    read = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_parquet
    for row, value in read(path, column, start):
        if isinstance(value, str):
            yield row, value.encode("utf-8", errors="replace")
        elif value is None or isinstance(value, (bytes, RowError)):
            yield row, value
        else:
            raise ColumnError(
                f"column={column!r} must hold text, got {type(value).__name__} in row {row} of "
                f"{path}. Pass column=<the one that holds the documents>."
            )


def _read_jsonl(path: Path, column: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yields row and value; blank lines are no rows."""
    found, others, num_records = start > 0, set[str](), 0
    with path.open("rb") as file:
        for row, line in enumerate(line for line in file if not line.isspace()):
            if row < start:
                continue
            record = _parse(line)
            if isinstance(record, RowError):
                yield row, record
                continue
            found = found or column in record
            if not found:
                num_records, others = num_records + 1, others | set(record)
            if num_records == _SAMPLE:
                break
            yield row, record.get(column)
    if not found and num_records:
        raise _missing(column, path, others)


def _parse(line: bytes) -> dict[str, Any] | RowError:
    try:
        record = json.loads(line.strip(), strict=False)
    except (ValueError, RecursionError) as error:
        return RowError(str(error))
    if isinstance(record, dict):
        return record
    return RowError(f"a row must be a JSON object, got {type(record).__name__}")


def _read_parquet(path: Path, column: str, start: int) -> Iterator[tuple[int, Any]]:
    # What has no byte has no columns either.
    if path.stat().st_size == 0:
        return
    try:
        from datasets import Dataset
    except ImportError as error:
        raise RuntimeError(
            f"reading {path} needs the package datasets. Install it with `pip install datasets`."
        ) from error
    # Only a lock file goes to the cache folder.
    with tempfile.TemporaryDirectory(prefix="longnet_zoo_datasets_") as cache_dir:
        table = Dataset.from_parquet(str(path), streaming=True, cache_dir=cache_dir)
        columns = table.column_names or list(next(iter(table), {}))
        if column not in columns:
            raise _missing(column, path, columns)
        for row, record in enumerate(table.select_columns([column]).skip(start), start):
            yield row, record[column]


def _missing(column: str, path: Path, columns: Any) -> ColumnError:
    return ColumnError(
        f"column={column!r} must be a column of {path}, which has {sorted(columns)}. Pass "
        "column=<the one that holds the documents>."
    )
