"""Tables of recordings: `.csv` with a header, or `.jsonl`; the columns are the same.

    path,label                       the class of a file
    path,label,start,end             of a part of it, in seconds
    path,transcript[,start,end]      what is said
    path,tag,start,end               an event; a file with none has one row with an empty tag

`path` is relative to the table's folder. A column `split` (train, val or test) says which split a
row is in; other columns are ignored.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .csv_rows import read_csv

__all__ = ["Row", "read_table"]

_KINDS = ("label", "tag", "transcript")
_SPLITS = ("train", "val", "test", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table; one of label, tag and transcript is not None.

    Attributes:
        path: The file, as the table has it.
        label: Class of the file or part.
        tag: Class of an event.
        transcript: What is said.
        start: Seconds since the beginning of the file; None where the table does not say.
        end: Likewise.
        split: "train", "val", "test", or "none" where the table does not say.
    """

    path: str
    label: str | None
    tag: str | None
    transcript: str | None
    start: float | None
    end: float | None
    split: str


def read_table(path: Path) -> list[Row]:
    """Reads a table.

    Args:
        path: A `.csv` or `.jsonl` file.

    Returns:
        Its rows; none if it is empty.

    Raises:
        ValueError: It cannot be read, or a row has no path, no number where one belongs, or not
            just one of label, tag and transcript. The message names the row.
    """
    read = _csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows
    try:
        return [_row(values, f"line {number} of {path}") for number, values in read(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the table {path}: {error}") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, values in read_csv(path):
        yield number, {name: value or "" for name, value in values.items()}


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"line {number} of {path} must be JSON: {error}.") from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"line {number} of {path} must be a JSON object, got {line.strip()[:60]!r}."
                )
            yield number, values


def _row(values: dict[str, Any], place: str) -> Row:
    kinds = [kind for kind in _KINDS if values.get(kind) is not None]
    if not values.get("path") or len(kinds) != 1:
        raise ValueError(
            "a row must have a path and one of label, tag and transcript, got "
            f"path={values.get('path')!r} and {', '.join(kinds) or 'none of these'} in {place}."
        )
    kind = kinds[0]
    if kind == "label" and values["label"] == "":
        raise ValueError(f"a label must not be empty, got '' in {place}.")
    start, end = (_seconds(values.get(name), name, place) for name in ("start", "end"))
    if kind == "tag" and values["tag"] != "" and (start is None or end is None):
        raise ValueError(f"an event must have start and end, got {start} and {end} in {place}.")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"start must be before end, got {start or 0.0} and {end} in {place}.")
    split = values.get("split") or "none"
    if split not in _SPLITS:
        raise ValueError(f"split must be train, val or test, got {split!r} in {place}.")
    texts = {name: str(values[name]) if name == kind else None for name in _KINDS}
    return Row(path=str(values["path"]), **texts, start=start, end=end, split=split)


def _seconds(value: Any, name: str, place: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be seconds, 0 or more, got {value!r} in {place}.")
    return number
