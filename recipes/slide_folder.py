"""A folder of slides and a table of their classes.

The table is a CSV file with a header: `slide_id` (a file's name), `label`, and
if wanted `split` ("train", "val" or "test") and `patient_id`; other columns are left alone. Without
`split` a hash decides, of the patient where the table names one, so that no patient is in two
splits.
"""

import csv
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from longnet_zoo.models.slide_checks import check_coordinates
from longnet_zoo.models.slide_config import GigaPathSlideConfig

from .classification_metrics import UNLABELLED
from .loader import OnError
from .slide_demo import Split
from .slide_files import SUFFIXES, list_slides, read_layout, read_slide
from .slide_loader import Slide

__all__ = ["FolderSlides", "load_folder", "load_unlabelled"]

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_NAMED = 5

_log = logging.getLogger(__name__)


class FolderSlides:
    """Slides in files, read when they are asked for.

    Args:
        paths: A file for each slide.
        labels: The class of each slide.
        input_dim: Channels of a tile embedding.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], *, input_dim: int) -> None:
        self._paths, self.labels = tuple(paths), tuple(labels)
        self.input_dim = input_dim

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
    encoder: GigaPathSlideConfig | None = None,
) -> tuple[tuple[str, ...], dict[Split, FolderSlides]]:
    """Finds slides and their classes, and checks all but the values of the tiles.

    Args:
        folder: Folder of slides, as for `list_slides`.
        labels: The table.
        val_fraction: Share held out for validation where the table has no splits.
        test_fraction: Share held out for the test where the table has no splits.
        on_error: What to do about slides of the table that are missing, damaged, of another
            embedding size than most, or with coordinates that `encoder` would refuse: "skip" logs
            them, "raise" stops.
        encoder: Config of the encoder; None leaves coordinates unchecked.

    Returns:
        Names of the classes, sorted; the slides of each split.

    Raises:
        ValueError: Folder or table is not as it should be; the message names the slides.
    """
    files = list_slides(folder)
    rows = _read_table(labels, files)
    classes = tuple(sorted({row["label"] for row in rows}))
    if len(classes) < 2:
        raise ValueError(
            f"labels must name two or more classes, got only {classes[0]!r} in {labels}."
        )
    names = [row["slide_id"] for row in rows]
    unlabelled = sorted(files.keys() - set(names))
    if unlabelled:
        _log.warning("left out, for want of a label: %s", _listed(unlabelled))
    usable, dim = _usable(
        names, files, folder=folder, kind="labelled slides", on_error=on_error, encoder=encoder
    )
    rows = [row for row in rows if row["slide_id"] in usable]
    slides = {}
    for split in _SPLITS:
        own = [row for row in rows if _split(row, val_fraction, test_fraction) == split]
        slides[split] = FolderSlides(
            [files[row["slide_id"]] for row in own],
            [classes.index(row["label"]) for row in own],
            input_dim=dim,
        )
    untrained = sorted(set(range(len(classes))) - set(slides["train"].labels))
    if untrained:
        raise ValueError(
            "each class needs a slide in the training split, got none for "
            f"{[classes[label] for label in untrained]} of {labels}. Write a column 'split', or "
            "hold out less."
        )
    return classes, slides


def load_unlabelled(
    folder: str | Path, *, on_error: OnError, encoder: GigaPathSlideConfig | None = None
) -> FolderSlides:
    """Finds slides without a table; their label is `UNLABELLED`.

    Args:
        folder: Folder of slides, as for `list_slides`.
        on_error: As for `load_folder`.
        encoder: As for `load_folder`; the slides must also have its embedding size.

    Returns:
        The slides, in the order of their names.

    Raises:
        ValueError: The folder holds no slides that can be used.
    """
    files = list_slides(folder)
    usable, dim = _usable(
        list(files),
        files,
        folder=folder,
        kind="slides",
        on_error=on_error,
        encoder=encoder,
        input_dim=None if encoder is None else encoder.input_dim,
    )
    paths = [path for name, path in files.items() if name in usable]
    return FolderSlides(paths, [UNLABELLED] * len(paths), input_dim=dim)


def _read_table(path: str | Path, slides: Collection[str]) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise ValueError(f"labels must be a CSV file, got {str(path)!r}, which does not exist.")
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or []]
            lines = [(reader.line_num, row.values()) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} must be a CSV file in UTF-8, got {error}. Save it as 'CSV UTF-8'."
        ) from error
    if not {"slide_id", "label"} <= set(columns):
        raise ValueError(
            f"{path} must have the columns slide_id and label, got {columns}. Write them into its "
            "first line, with commas between them."
        )
    if not lines:
        raise ValueError(f"{path} must have a line for each slide, got a header only.")
    rows: dict[str, dict[str, str]] = {}
    for number, values in lines:
        # Blanks around a value are invisible, and would make classes of their own; a row that is
        # too long has a list at its end.
        cells = (value.strip() if isinstance(value, str) else "" for value in values)
        row = dict(zip(columns, cells, strict=False))
        name = row["slide_id"]
        if name not in slides and Path(name).suffix in SUFFIXES:
            name = row["slide_id"] = Path(name).stem
        _check_row(row, f"{path}, line {number}", has_split="split" in columns)
        if name in rows:
            raise ValueError(f"{path}, line {number}: a slide has one line, got {name!r} again.")
        rows[name] = row
    _check_patients(rows.values(), path)
    return list(rows.values())


def _check_row(row: dict[str, str], place: str, *, has_split: bool) -> None:
    if not row["slide_id"] or not row["label"]:
        raise ValueError(
            f"{place}: slide_id and label must not be empty, got {row['slide_id']!r} and "
            f"{row['label']!r}."
        )
    if has_split and row["split"] not in _SPLITS:
        raise ValueError(f"{place}: split must be one of {_SPLITS}, got {row['split']!r}.")


def _check_patients(rows: Collection[dict[str, str]], path: str | Path) -> None:
    """Refuses a patient in two splits: the test would know who was trained on."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.get("patient_id") and row.get("split"):
            splits[row["patient_id"]].add(row["split"])
    leaks = [
        f"{patient!r} in {' and '.join(sorted(own))}"
        for patient, own in splits.items()
        if len(own) > 1
    ]
    if leaks:
        raise ValueError(
            f"{path}: all slides of a patient must be in one split, got {_listed(leaks)}. Move "
            "them, or remove the column 'split'."
        )


def _usable(
    names: Sequence[str],
    files: dict[str, Path],
    *,
    folder: str | Path,
    kind: str,
    on_error: OnError,
    encoder: GigaPathSlideConfig | None,
    input_dim: int | None = None,
) -> tuple[set[str], int]:
    """Returns which slides can be used, and the channels of their embeddings.

    Those are `input_dim`, or what most slides have.
    """
    dims: dict[str, int] = {}
    problems: dict[str, str] = {}
    for name in names:
        try:
            dims[name] = _check_layout(files.get(name), name=name, folder=folder, encoder=encoder)
        except ValueError as error:
            problems[name] = str(error)
    dim = input_dim or (Counter(dims.values()).most_common(1)[0][0] if dims else 0)
    reader = "most slides have" if input_dim is None else "the encoder reads"
    for name, own in dims.items():
        if own != dim:
            problems[name] = f"{files[name]} has embeddings of {own} channels, {reader} {dim}"
    if problems:
        _report(problems, on_error=on_error, number=len(names), kind=kind)
    return dims.keys() - problems.keys(), dim


def _check_layout(
    path: Path | None,
    *,
    name: str,
    folder: str | Path,
    encoder: GigaPathSlideConfig | None,
) -> int:
    """Checks a slide without reading its tiles, and returns the channels of an embedding."""
    if path is None:
        raise ValueError(f"{name} is not in {folder}")
    dim, coords = read_layout(path)
    if encoder is not None:
        sizes = {"tile_size": encoder.tile_size, "grid_size": encoder.grid_size}
        try:
            check_coordinates(coords[None], None, **sizes)
        except ValueError as error:
            # It speaks of a batch, and this is one slide.
            reason = str(error).replace(" of slide 0", "")
            raise ValueError(
                f"{path}: {reason} Here these are options of model.model_options."
            ) from error
    return dim


def _report(problems: dict[str, str], *, on_error: OnError, number: int, kind: str) -> None:
    reasons = _listed([reason.rstrip(".") for reason in problems.values()], separator="; ")
    if len(problems) == number:
        raise ValueError(f"{number} of {number} {kind} cannot be used: {reasons}.")
    if on_error == "raise":
        raise ValueError(
            f"{len(problems)} of {number} {kind} cannot be used: {reasons}. Mend or remove them, "
            "or pass --data.on_error skip to go on with others."
        )
    _log.warning("skipped %d of %d %s: %s", len(problems), number, kind, reasons)


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
