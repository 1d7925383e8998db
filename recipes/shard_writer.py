"""Writes tar shards, the format of `recipes.shards`, from a folder of files or from a table.

    python -m recipes.shard_writer --source photos --folder shards --val_fraction 0.05
    python -m recipes.shard_writer --source captions.csv --folder shards \
        --columns '{image: file, caption: txt}'
    python -m recipes.shard_writer --source clips.jsonl --folder shards \
        --columns '{audio: file, label: cls}'

In a folder, files with the same path up to the first dot of their name are one sample, as
`a/0001.jpg` and `a/0001.txt`; their order is mixed, since folders are often classes. A table, .csv,
.tsv, .jsonl or .parquet, holds a sample a row, and keeps its order. The shards are
`FOLDER/train-000000.tar` and so on, and the same input gives the same bytes.
"""

import contextlib
import functools
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from recipes.cli import report_error
from recipes.csv_rows import read_csv
from recipes.loader import OnError, fair_order
from recipes.shard_files import Problem, split_name
from recipes.shard_hub import HubSource
from recipes.text_corpus import split_of

__all__ = ["ShardWriter", "main", "write_shards"]

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")

# In `columns`, for one that names a file.
_FILE = "file"

# Key of a sample, what its split hangs on, and how to get its parts.
_Entry = tuple[str, str, Callable[[], dict[str, bytes]]]

_log = logging.getLogger(__name__)


class ShardWriter:
    """Writes samples one after another; a shard appears when it is complete.

    Args:
        folder: Where to write; made if there is none.
        prefix: What the names of the shards begin with.
        samples_per_shard: Samples in a shard; the last one may hold fewer.

    Raises:
        ValueError: There are such shards already, or `samples_per_shard` is below 1.
    """

    def __init__(
        self, folder: str | Path, *, prefix: str = "train", samples_per_shard: int = 1000
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be 1 or more, got {samples_per_shard}.")
        self._folder, self._prefix = Path(folder), prefix
        self._samples_per_shard = samples_per_shard
        self._folder.mkdir(parents=True, exist_ok=True)
        found = sorted(self._folder.glob(f"{prefix}-[0-9]*.tar"))
        if found:
            raise ValueError(
                f"shards are written beside no older ones, got {len(found)} in {folder}, the first "
                f"is {found[0].name}. Remove them, or pass another folder."
            )
        self._archive: tarfile.TarFile | None = None
        self.num_samples = self.num_shards = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self._archive is not None:
            self._archive.close()
            if kind is None:
                self._finish()
            else:
                self._path(".tmp").unlink()

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Adds a sample.

        Args:
            key: Its name, with no dot behind the last slash.
            parts: Contents by extension.

        Raises:
            ValueError: The key has a dot, or there are no parts.
        """
        if split_name(key)[1] or not parts:
            raise ValueError(
                f"a sample needs a key without a dot in its last part, and contents, got {key!r} "
                f"with {len(parts)} contents."
            )
        if self._archive is None:
            self._archive = tarfile.open(self._path(".tmp"), "w")  # noqa: SIM115
        for extension, content in parts.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            self._archive.addfile(member, io.BytesIO(content))
        self.num_samples += 1
        if self.num_samples % self._samples_per_shard == 0:
            self._archive.close()
            self._finish()

    def _finish(self) -> None:
        os.replace(self._path(".tmp"), self._path(".tar"))
        self._archive = None
        self.num_shards += 1

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._prefix}-{self.num_shards:06}{suffix}"


def write_shards(
    *,
    source: str,
    folder: str,
    columns: dict[str, str] | None = None,
    samples_per_shard: int = 1000,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    on_error: OnError = "skip",
) -> dict[str, tuple[int, int]]:
    """Writes shards of each split.

    Args:
        source: A folder of files, or a table: .csv or .tsv with a line of names, .jsonl, .parquet.
        folder: Where to write; made if there is none.
        columns: For a table, what each column to take becomes: "file" where it names a file, as
            seen from the table, which is stored with its extension; any other word is the
            extension that the value is stored with, such as txt.
        samples_per_shard: Samples in a shard; the last one of a split may hold fewer.
        val_fraction: Share of samples for `val-*.tar`, by a hash of their first file's name, so
            that several captions of a picture stay together; without files, of the row's number.
        test_fraction: Share of samples for `test-*.tar`.
        on_error: "skip" logs samples that cannot be read and goes on; "raise" stops at them.

    Returns:
        Samples and shards of each split.

    Raises:
        ValueError: The source cannot be read or holds nothing, an option is out of range, or there
            are shards in the folder.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            "val_fraction and test_fraction must be 0 or more and leave something for training, "
            f"got {val_fraction} and {test_fraction}."
        )
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    splits = ["train", *(["val"] if val_fraction else []), *(["test"] if test_fraction else [])]
    options: dict[str, Any] = {"samples_per_shard": samples_per_shard}
    entries, num_skipped = _entries(source, columns), 0
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder, prefix=split, **options))
            for split in splits
        }
        for key, name, read in entries:
            try:
                writers[split_of(name, **fractions)].write(key, read())
            except (OSError, ValueError) as error:
                if on_error == "raise":
                    raise ValueError(
                        f"{source}, sample {key}: {error} (Or pass --on_error skip, which goes on "
                        "without such samples.)"
                    ) from error
                _log.warning("skipped: %s, sample %s: %s", source, key, error)
                num_skipped += 1
    written = {split: (writer.num_samples, writer.num_shards) for split, writer in writers.items()}
    total = sum(number for number, _ in written.values())
    if not total:
        raise ValueError(
            f"source must hold samples, got {source!r} with none that can be read, {num_skipped} "
            "were skipped. The log says why."
        )
    if num_skipped:
        _log.warning("skipped %d of %d samples of %s", num_skipped, total + num_skipped, source)
    return written


def _entries(source: str, columns: dict[str, str] | None) -> Iterator[_Entry]:
    """Finds the samples of a source, and checks that `columns` fits it."""
    path = Path(source).expanduser()
    if path.is_dir():
        if columns is not None:
            raise ValueError(f"columns is for tables, got {columns} and the folder {source!r}.")
        return _folder_entries(path)
    if path.suffix.lower() not in _TABLES or not path.is_file():
        raise ValueError(
            f"source must be a folder or an existing table ({' '.join(_TABLES)}), got {source!r}."
        )
    if not columns:
        raise ValueError(
            f"a table needs columns, got {columns} and {source!r}. Pass --columns "
            "'{image: file, caption: txt}' with the names of its columns."
        )
    return _table_entries(path, columns)


def _folder_entries(folder: Path) -> Iterator[_Entry]:
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # Hidden files are no data of the user's.
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            key, extension = split_name(name)
            groups.setdefault(key, {})[extension] = path
    keys = list(groups)
    for place in fair_order(len(keys)):
        yield keys[place], keys[place], functools.partial(_read_files, groups[keys[place]])


def _read_files(paths: Mapping[str, Path]) -> dict[str, bytes]:
    return {extension: path.read_bytes() for extension, path in paths.items()}


def _table_entries(path: Path, columns: Mapping[str, str]) -> Iterator[_Entry]:
    files = [column for column, kind in columns.items() if kind == _FILE]
    for row, record in enumerate(_records(path)):
        key = f"{row:09}"
        if row == 0 and not isinstance(record, Problem) and not columns.keys() <= record.keys():
            raise ValueError(
                f"columns must be those of the table, got {', '.join(columns)} and {path} with "
                f"{', '.join(record)}."
            )
        name = key if isinstance(record, Problem) or not files else str(record.get(files[0]))
        yield key, name, functools.partial(_read_record, path.parent, record, columns)


def _read_record(
    folder: Path, record: dict[str, Any] | Problem, columns: Mapping[str, str]
) -> dict[str, bytes]:
    if isinstance(record, Problem):
        raise ValueError(record.reason)
    parts: dict[str, bytes] = {}
    for column, kind in columns.items():
        value = record.get(column)
        if value is None:
            raise ValueError(f"its column {column!r} holds nothing")
        if kind == _FILE:
            kind, value = split_name(str(value))[1], (folder / str(value)).read_bytes()
        if kind in parts:
            raise ValueError(f"two of its columns become {kind!r}")
        parts[kind] = value if isinstance(value, bytes) else str(value).encode()
    return parts


def _records(path: Path) -> Iterator[dict[str, Any] | Problem]:
    """Yields the rows of a table.

    Raises:
        ValueError: It is no such table.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from _parquet_records(path)
        return
    if kind != ".jsonl":
        yield from (row for _, row in read_csv(path, delimiter="\t" if kind == ".tsv" else ","))
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (_parse(line) for line in file if not line.isspace())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a {kind} table must be readable as UTF-8, got {path}: {error}. Save it as such."
        ) from error


def _parse(line: str) -> dict[str, Any] | Problem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem("", str(error))
    return record if isinstance(record, dict) else Problem("", f"a row must be an object: {line}")


def _parquet_records(path: Path) -> Iterator[dict[str, Any] | Problem]:
    try:
        source = HubSource("parquet", data_files=str(path))
        yield from (row for shard in range(len(source.shards)) for row in source.rows(shard))
    except OSError as error:
        yield Problem("", f"the table cannot be read any further: {error}")


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    try:
        written = auto_cli(write_shards, args=args, as_positional=False)
    except Exception as error:
        report_error(error)
    for split, (num_samples, num_shards) in written.items():
        print(f"{split}: {num_samples:,} samples in {num_shards:,} shards")


if __name__ == "__main__":
    main()
