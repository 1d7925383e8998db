"""Where pairs of an image and a caption come from: icons, pages of icons, or a table of files.

Each kind offers the same (`Pairs`): a name and a class of each pair, and `read`. What a pair looks
like in training is drawn by the generator that `read` gets, so it is a pure function of its seed.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
from PIL import Image

from .classification_metrics import UNLABELLED
from .csv_rows import read_csv
from .icons import Icon, load_icons, render_icon, split_icons
from .image_files import find_images, read_image
from .text_corpus import split_of

__all__ = [
    "IconPages",
    "IconPairs",
    "ImageFolder",
    "PairTable",
    "Pairs",
    "Split",
    "TableColumns",
    "icon_classes",
    "load_icon_pairs",
    "load_table",
]

Split = Literal["train", "val", "test"]

_TABLES = (".csv", ".jsonl")
_NUM_ICON_CLASSES = 20


class Pairs(Protocol):
    """Pairs of an image and a caption.

    Attributes:
        names: Name of each pair, the path of the image where it is a file.
        labels: Class of each pair, `UNLABELLED` where it has none.
    """

    names: Sequence[str]
    labels: Sequence[int]

    def read(
        self, place: int, *, generator: np.random.Generator | None = None
    ) -> tuple[Image.Image, str]:
        """Returns image (RGB) and caption of a pair.

        Args:
            place: Number of the pair.
            generator: Draws how it looks in training; None for how it always looks.

        Raises:
            OSError: The image cannot be read.
            ValueError: The image is refused, or there is no caption.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class IconPairs:
    """Icons and their names; in training in any colour, size and place.

    Attributes:
        icons: The icons.
        classes: What an icon may show, as `icon_classes` returns it.
        size: Pixels of a side.
    """

    icons: Sequence[Icon]
    classes: Sequence[str]
    size: int

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the icons."""
        return [icon.name for icon in self.icons]

    @functools.cached_property
    def labels(self) -> list[int]:
        """What the icons show, by the first word of their names."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return [numbers.get(icon.caption.split()[0], UNLABELLED) for icon in self.icons]

    def read(
        self, place: int, *, generator: np.random.Generator | None = None
    ) -> tuple[Image.Image, str]:
        """Returns image and caption of an icon."""
        return render_icon(self.icons[place], self.size, generator=generator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IconPages:
    """Pages of icons in rows and columns, with all their names as one long caption.

    There are as many pages as icons. A page shows its icon first, and others drawn from the same
    icons, in training anew each time.

    Attributes:
        icons: The icons.
        cells: Icons of a row, and rows.
        size: Pixels of a side of the page.
    """

    icons: Sequence[Icon]
    cells: int
    size: int

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the pages."""
        return [f"page/{icon.name}" for icon in self.icons]

    @functools.cached_property
    def labels(self) -> list[int]:
        """No classes: a page shows many things."""
        return [UNLABELLED] * len(self.icons)

    def read(
        self, place: int, *, generator: np.random.Generator | None = None
    ) -> tuple[Image.Image, str]:
        """Returns a page and its caption, such as "bell; red arrow left; file bold"."""
        draws = np.random.default_rng(place) if generator is None else generator
        others = draws.integers(len(self.icons), size=self.cells**2 - 1)
        # What is left over of the side is margin.
        cell = self.size // self.cells
        margin = (self.size - cell * self.cells) // 2
        page, captions = Image.new("RGB", (self.size, self.size), "white"), []
        for number, i in enumerate([place, *others.tolist()]):
            row, column = divmod(number, self.cells)
            image, caption = render_icon(self.icons[i], cell, generator=generator)
            page.paste(image, (margin + column * cell, margin + row * cell))
            captions.append(caption)
        return page, "; ".join(captions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTable:
    """Images of files and the captions that a table has for them.

    Attributes:
        table: The table.
        names: Path of each image.
        captions: Caption of each image.
        rows: Row of the table that each pair comes from, counted from 1.
        labels: Class of each pair.
        max_pixels: An image with more is refused.
    """

    table: Path
    names: Sequence[str]
    captions: Sequence[str]
    rows: Sequence[int]
    labels: Sequence[int]
    max_pixels: int

    def read(
        self, place: int, *, generator: np.random.Generator | None = None
    ) -> tuple[Image.Image, str]:
        """Returns image and caption of a pair, in training as well."""
        caption = self.captions[place].strip()
        if not caption:
            raise ValueError(
                f"an image needs a caption, got an empty one for {self.names[place]} in row "
                f"{self.rows[place]} of {self.table}."
            )
        return read_image(self.names[place], max_pixels=self.max_pixels), caption


class ImageFolder:
    """Images without captions, to be searched.

    Args:
        source: A folder, or one image.
        max_pixels: An image with more is refused.
    """

    def __init__(self, source: str, *, max_pixels: int) -> None:
        self.names: Sequence[str] = find_images(source)
        self.labels: Sequence[int] = [UNLABELLED] * len(self.names)
        self._max_pixels = max_pixels

    def read(
        self, place: int, *, generator: np.random.Generator | None = None
    ) -> tuple[Image.Image, str]:
        """Returns an image and its path, which stands for a caption."""
        name = self.names[place]
        return read_image(name, max_pixels=self._max_pixels), name


def load_icon_pairs(
    *, size: int, pages: int, val_fraction: float, test_fraction: float
) -> tuple[tuple[str, ...], dict[Split, Pairs]]:
    """Makes the pairs of all splits from icons.

    Args:
        size: Pixels of a side of an image.
        pages: Icons in a row of a page, and rows; 0 for images of one icon.
        val_fraction: Share of the concepts held out for validation.
        test_fraction: Share held out for the test.

    Returns:
        What the icons show most often, and the pairs of each split.

    Raises:
        ValueError: The cells of a page are too small.
        RuntimeError: The package with the icons is not installed.
    """
    if pages and size // pages < 8:
        raise ValueError(
            f"an icon needs a cell of at least 8 x 8 pixels, got pages={pages} on an image of "
            f"{size} x {size}. Use fewer icons, or a model with a larger image.img_size."
        )
    splits = split_icons(load_icons(), val_fraction=val_fraction, test_fraction=test_fraction)
    if pages:
        made = {
            split: IconPages(icons=icons, cells=pages, size=size) for split, icons in splits.items()
        }
        return (), cast(dict[Split, Pairs], made)
    classes = icon_classes(splits["train"])
    return classes, {
        split: IconPairs(icons=icons, classes=classes, size=size) for split, icons in splits.items()
    }


def icon_classes(icons: Sequence[Icon]) -> tuple[str, ...]:
    """Returns the first words of the most concepts, which say what an icon shows."""
    concepts = dict.fromkeys(icon.concept for icon in icons)
    counts = collections.Counter(concept.split()[0] for concept in concepts)
    return tuple(word for word, _ in counts.most_common(_NUM_ICON_CLASSES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Columns of a table of pairs.

    Attributes:
        image: Path of the image, relative to the folder of the table or absolute.
        caption: What the image shows.
        label: Its class, for zero-shot classification; null where there is none.
        split: "train", "val" or "test"; without such a column, a hash of the path decides.
    """

    image: str = "image"
    caption: str = "caption"
    label: str | None = None
    split: str = "split"


def load_table(
    source: str | Path,
    *,
    columns: TableColumns,
    val_fraction: float,
    test_fraction: float,
    max_pixels: int,
) -> tuple[tuple[str, ...], dict[Split, Pairs]]:
    """Reads a table of images and captions; the images are not opened yet.

    Args:
        source: A `.csv` or `.jsonl` file, or a folder with one such file.
        columns: Names of its columns.
        val_fraction: Share held out for validation where the table has no split.
        test_fraction: Share held out for the test where the table has no split.
        max_pixels: An image with more is refused when it is read.

    Returns:
        Names of the classes, and the pairs of each split.

    Raises:
        ValueError: There is no such table, it is damaged or lacks a column.
    """
    table = _find_table(Path(source))
    records = _read_csv(table) if table.suffix == ".csv" else _read_jsonl(table)
    for row, record in records.items():
        _check_record(record, columns, where=f"row {row} of {table}")
    labels = {record.get(columns.label, "") for record in records.values()}
    classes = tuple(sorted(labels - {""}))
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    rows: dict[Split, list[int]] = {split: [] for split in get_args(Split)}
    for row, record in records.items():
        split = record.get(columns.split) or split_of(record[columns.image], **fractions)
        if not isinstance(split, str) or split not in rows:
            raise ValueError(
                f"a split is one of {', '.join(rows)}, got {split!r} in row {row} of {table}."
            )
        rows[split].append(row)
    made = {}
    for split, own in rows.items():
        chosen = [records[row] for row in own]
        made[split] = PairTable(
            table=table,
            names=[str(table.parent / record[columns.image]) for record in chosen],
            captions=[record[columns.caption] or "" for record in chosen],
            rows=own,
            labels=[_label(record.get(columns.label), classes) for record in chosen],
            max_pixels=max_pixels,
        )
    return classes, cast(dict[Split, Pairs], made)


def _find_table(source: Path) -> Path:
    found = [source]
    if source.is_dir():
        found = [path for path in sorted(source.iterdir()) if path.suffix in _TABLES]
    if len(found) != 1 or not found[0].is_file() or found[0].suffix not in _TABLES:
        raise ValueError(
            "pairs of files are listed in one .csv or .jsonl file, given by its path or its "
            f"folder's, got {str(source)!r} with "
            f"{', '.join(path.name for path in found if path.is_file()) or 'none'}. Or pass "
            "data.source=icons, or shards (.tar)."
        )
    return found[0]


def _read_csv(table: Path) -> dict[int, dict[str, str]]:
    return {
        row: {key: value or "" for key, value in record.items()}
        for row, (_, record) in enumerate(read_csv(table), 1)
    }


def _read_jsonl(table: Path) -> dict[int, dict[str, Any]]:
    records = {}
    for row, line in enumerate(table.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            records[row] = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"each row must be a JSON object, got {error} in row {row} of {table}."
            ) from error
    return records


def _check_record(record: Any, columns: TableColumns, *, where: str) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"each row must be a JSON object, got {record!r} in {where}.")
    for name in (columns.image, columns.caption, columns.label):
        if name is None:
            continue
        value = record.get(name)
        # One without a caption is found when it is read.
        is_fine = isinstance(value, str) or (name == columns.caption and value is None)
        if name not in record or not is_fine:
            raise ValueError(
                f"each row needs text in the column {name!r}, got {value!r} among "
                f"{', '.join(record)} in {where}. Name the columns with data.columns."
            )


def _label(name: str | None, classes: Sequence[str]) -> int:
    return classes.index(name) if name in classes else UNLABELLED
