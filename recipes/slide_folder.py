"""A folder of slides and a table of their classes.

The table is a CSV file with a header: `slide_id` (a file's name without its suffix), `label`, and
if wanted `split` ("train", "val" or "test") and `patient_id`; other columns are left alone. Without
`split` a hash decides, of the patient where the table names one, so that no patient is in two
splits.
"""

import csv
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .classification_metrics import UNLABELLED
from .slide_demo import Split
from .slide_files import list_slides, read_slide, slide_shape
from .slide_loader import Slide

__all__ = ["FolderSlides", "load_folder", "load_unlabelled"]

OnError = Literal["skip", "raise"]

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_NAMED = 5

_log = logging.getLogger(__name__)


class FolderSlides:
    """Slides in files, read when they are asked for.

    Args:
        paths: A file for each slide.
        labels: The class of each slide.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self._paths, self.labels = tuple(paths), tuple(labels)

    def __getitem__(self, index: int) -> Slide:
        path = self._paths[index]
        return Slide(*read_slide(path), self.labels[index], path.stem)


def load_folder(
    folder: str | Path,
    *,
    labels: str | Path,
    val_fraction: float,
    test_fraction: float,
    on_error: OnError,
) -> tuple[tuple[str, ...], dict[Split, FolderSlides], int]:
    """Finds slides and their classes.

    Args:
        folder: Folder of slides, as for `list_slides`.
        labels: The table.
        val_fraction: Share held out for validation where the table has no splits.
        test_fraction: Share held out for the test where the table has no splits.
        on_error: What to do about slides of the table that are missing or damaged: "skip" logs
            them, "raise" stops.

    Returns:
        Names of the classes, sorted; the slides of each split; channels of a tile embedding.

    Raises:
        ValueError: Folder or table is not as it should be; the message names the slides.
    """
    files, rows = list_slides(folder), _read_table(labels)
    unlabelled = sorted(files.keys() - {row["slide_id"] for row in rows})
    if unlabelled:
        _log.warning("left out, for want of a label: %s", _listed(unlabelled))
    shapes, problems = {}, {}
    for row in rows:
        name = row["slide_id"]
        try:
            shapes[name] = _shape(files.get(name), name=name, folder=folder)
        except ValueError as error:
            problems[name] = str(error)
    if problems:
        _report(problems, on_error=on_error, num_rows=len(rows))
    rows = [row for row in rows if row["slide_id"] in shapes]
    dim = _common_dim({name: dim for name, (_, dim) in shapes.items()}, folder)
    classes = tuple(sorted({row["label"] for row in rows}))
    split_of = [_split(row, val_fraction, test_fraction) for row in rows]
    slides = {}
    for split in _SPLITS:
        own = [row for row, own_split in zip(rows, split_of, strict=True) if own_split == split]
        paths = [files[row["slide_id"]] for row in own]
        slides[split] = FolderSlides(paths, [classes.index(row["label"]) for row in own])
    untrained = sorted(set(range(len(classes))) - set(slides["train"].labels))
    if untrained:
        raise ValueError(
            "each class needs a slide in the training split, got none for "
            f"{[classes[label] for label in untrained]} of {labels}. Write a column 'split', or "
            "hold out less."
        )
    return classes, slides, dim


def load_unlabelled(folder: str | Path) -> FolderSlides:
    """Finds slides without a table; their label is `UNLABELLED`.

    Args:
        folder: Folder of slides, as for `list_slides`.

    Returns:
        The slides, in the order of their names.

    Raises:
        ValueError: The folder holds no slides.
    """
    paths = list(list_slides(folder).values())
    return FolderSlides(paths, [UNLABELLED] * len(paths))


def _read_table(path: str | Path) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise ValueError(f"labels must be a CSV file, got {str(path)!r}, which does not exist.")
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        rows = list(reader)
    if not {"slide_id", "label"} <= set(columns):
        raise ValueError(
            f"{path} must have the columns slide_id and label, got {list(columns)}. Write them "
            "into its first line."
        )
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        name, split = row["slide_id"], row.get("split")
        if not name or not row["label"]:
            raise ValueError(
                f"{path}, line {number}: slide_id and label must not be empty, got {name!r} and "
                f"{row['label']!r}."
            )
        if "split" in columns and split not in _SPLITS:
            raise ValueError(
                f"{path}, line {number}: split must be one of {_SPLITS}, got {split!r}."
            )
        if name in seen:
            raise ValueError(f"{path}, line {number}: a slide has one line, got {name!r} again.")
        seen.add(name)
    return rows


def _shape(path: Path | None, *, name: str, folder: str | Path) -> tuple[int, int]:
    if path is None:
        raise ValueError(f"{name} is not in {folder}")
    return slide_shape(path)


def _report(problems: dict[str, str], *, on_error: OnError, num_rows: int) -> None:
    reasons = _listed(list(problems.values()), separator="; ")
    if on_error == "raise" or len(problems) == num_rows:
        raise ValueError(
            f"{len(problems)} of {num_rows} labelled slides cannot be used: {reasons}. Mend or "
            "remove them, or pass on_error='skip' to go on with others."
        )
    _log.warning("skipped %d of %d labelled slides: %s", len(problems), num_rows, reasons)


def _common_dim(dims: dict[str, int], folder: str | Path) -> int:
    """Returns the channels that all slides have."""
    found = {dim: name for name, dim in dims.items()}
    if len(found) != 1:
        raise ValueError(
            f"all slides must have the same embedding size, got {found} (size: a slide) in "
            f"{folder}. Embed them with one tile encoder."
        )
    return next(iter(found))


def _split(row: dict[str, str], val_fraction: float, test_fraction: float) -> Split:
    if row.get("split"):
        return row["split"]  # type: ignore[return-value]
    digest = hashlib.sha256((row.get("patient_id") or row["slide_id"]).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def _listed(names: list[str], *, separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more
