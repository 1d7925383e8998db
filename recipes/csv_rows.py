"""Reads the rows of `.csv` tables so that nothing in them is lost in silence."""

import csv
from collections.abc import Iterator
from pathlib import Path

__all__ = ["read_csv"]

# Most letters of a value. Python's own limit is less than a long transcript has; it is there for
# quotes without an end, which `strict` finds.
_MAX_LETTERS = 2**31 - 1


def read_csv(path: Path, *, delimiter: str = ",") -> Iterator[tuple[int, dict[str, str | None]]]:
    """Reads a table with a line of names.

    Args:
        path: The file, in UTF-8, with or without a mark at its beginning.
        delimiter: What stands between two values.

    Yields:
        Number of the line in which a row ends, and its values by column; None where the line is too
        short.

    Raises:
        ValueError: It is not in UTF-8, a quote has no end, or a row has more values than there are
            columns.
        OSError: It cannot be read.
    """
    csv.field_size_limit(_MAX_LETTERS)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for values in reader:
                # What a comma at the end of a line begins is nothing.
                extra = [value for value in values.pop(None, ()) if value]
                if extra:
                    raise ValueError(
                        f"a row may have a value for each of the {len(values)} columns, got "
                        f"{', '.join(extra)!r} behind them in line {reader.line_num} of {path}. "
                        f"Put values that hold {delimiter!r} into quotes."
                    )
                yield reader.line_num, values
        except UnicodeDecodeError as error:
            raise ValueError(
                f"a {path.suffix} table must be readable as UTF-8, got {error} in {path}. Save it "
                "as such."
            ) from error
        except csv.Error as error:
            raise ValueError(
                f"a quote must end before {delimiter!r} or the line does, and be doubled within "
                f"a value, got {error} in the row from line {reader.line_num + 1} of {path} on. "
                "Correct it there."
            ) from error
