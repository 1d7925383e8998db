"""The images of a classification task: where they are, which split each is in, reading one."""

import contextlib
import dataclasses
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from longnet_zoo.image_text import as_rgb

from .text_corpus import split_of

__all__ = ["DIGITS", "ImageFiles", "find_images", "load_images", "read_image"]

Split = Literal["train", "val", "test"]

DIGITS = Path(__file__).parent / "assets" / "digits" / "digits.csv.gz"
_DIGIT_SIDE, _DIGIT_LEVELS = 8, 16

# What Pillow reads; of a slide (.svs) that is the largest level.
_EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".svs", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Images with names and classes, read one at a time.

    Attributes:
        names: Name of each image, the path where it is a file.
        labels: Class of each image.
        pixels: The images themselves, (images, rows, columns) uint8, where they are in memory.
        max_pixels: An image of a file with more is refused.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    pixels: np.ndarray | None = None
    max_pixels: int

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """Reads an image, RGB; raises as `read_image`."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index]).convert("RGB")
        return read_image(self.names[index], max_pixels=self.max_pixels)

    def take(self, places: Sequence[int]) -> "ImageFiles":
        """Returns some of the images."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[place] for place in places),
            labels=tuple(self.labels[place] for place in places),
            pixels=None if self.pixels is None else self.pixels[list(places)],
        )


def load_images(
    source: str, *, val_fraction: float, test_fraction: float, max_pixels: int
) -> tuple[tuple[str, ...], dict[Split, ImageFiles]]:
    """Finds the images of all splits; files are not opened yet.

    Args:
        source: "digits" (1,797 handwritten digits that come with the recipe), or a folder with a
            subfolder for each class, or one with such folders in `train`, `val` and `test`.
        val_fraction: Share held out for validation where there is no folder `val`. Which images
            is decided by a hash of the path below `source`.
        test_fraction: Share held out for the test in a folder without `train`.
        max_pixels: An image of a file with more is refused when it is read.

    Returns:
        Names of the classes, and the images of each split.

    Raises:
        ValueError: The source has no such layout, or a class has no training images.
    """
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    if source == "digits":
        classes = tuple("0123456789")
        splits = _split(_digits(), fractions)
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(
                f"source must be 'digits' or a folder of images, got {source!r}, which is no "
                "folder. Pass its path as data.source."
            )
        has_splits = (folder / "train").is_dir()
        classes = _class_names(folder / "train" if has_splits else folder)
        if has_splits:
            splits = _given_splits(folder, classes, fractions, max_pixels)
        else:
            splits = _split(_class_files(folder, classes, max_pixels), fractions, root=folder)
    counts = np.bincount(splits["train"].labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"every class needs training images, got none in {source!r} for {', '.join(empty)}. "
            f"Files with one of {' '.join(sorted(_EXTENSIONS))} are read; add some, or lower "
            "data.val_fraction and data.test_fraction."
        )
    return classes, splits


def find_images(source: str) -> list[str]:
    """Lists the image files below a folder, sorted, or the one file given.

    Raises:
        ValueError: There are none.
    """
    path = Path(source)
    if path.is_file():
        return [str(path)]
    found = [str(p) for p in _image_paths(path)]
    if not found:
        raise ValueError(
            f"{source!r} must be an image or a folder with images, and there is none. Files with "
            f"one of {' '.join(sorted(_EXTENSIONS))} are read."
        )
    return found


def _image_paths(folder: Path) -> list[Path]:
    """Lists the image files below a folder, sorted; hidden ones are no images of the user's."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_image(path: str | Path, *, max_pixels: int) -> Image.Image:
    """Reads an image file as RGB, upright as its EXIF data say, on white where it is transparent.

    Args:
        path: The file.
        max_pixels: Most pixels of an image, a guard against files that unpack to much more
            memory than they seem to need. Pillow's own is for pictures of a camera.

    Returns:
        The image, decoded.

    Raises:
        OSError: The file cannot be read or is damaged.
        ValueError: It has too many pixels, or more than 8 bits a channel.
    """
    with no_pixel_limit():
        try:
            image = Image.open(path)
        except Exception as error:
            raise OSError(f"cannot read {path}: {error}") from error
        with image:
            number = image.width * image.height
            if number > max_pixels:
                raise ValueError(
                    f"an image may have max_pixels={max_pixels:,} pixels, got {image.width:,} x "
                    f"{image.height:,} = {number:,} in {path}. If it is meant to be that large, "
                    f"pass --data.max_pixels {number}."
                )
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"an image must have 8 bits a channel, got Pillow's mode {image.mode!r} in "
                    f"{path}. Scale it to 0..255 and save it again."
                )
            try:
                # Damaged files show themselves as OSError, SyntaxError, struct.error and more.
                # In place: a copy of a slide may not fit into memory.
                ImageOps.exif_transpose(image, in_place=True)
                return as_rgb(image)
            except Exception as error:
                raise OSError(f"cannot read {path}: {error}") from error


@contextlib.contextmanager
def no_pixel_limit() -> Iterator[None]:
    """Lifts Pillow's limit of pixels, which holds for the whole process, and puts it back."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _digits() -> ImageFiles:
    with gzip.open(DIGITS, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
    pixels = rows[:, :-1].reshape(-1, _DIGIT_SIDE, _DIGIT_SIDE) * 255 // _DIGIT_LEVELS
    return ImageFiles(
        names=tuple(f"digits/{number:04d}" for number in range(len(rows))),
        labels=tuple(rows[:, -1].tolist()),
        pixels=pixels.astype(np.uint8),
        max_pixels=_DIGIT_SIDE**2,
    )


def _split(
    images: ImageFiles, fractions: dict[str, float], *, root: Path | None = None
) -> dict[Split, ImageFiles]:
    """Splits by a hash of the names, so that an image stays where it is when others come."""
    places: dict[Split, list[int]] = {"train": [], "val": [], "test": []}
    for place, name in enumerate(images.names):
        key = name if root is None else Path(name).relative_to(root).as_posix()
        places[split_of(key, **fractions)].append(place)
    return {split: images.take(own) for split, own in places.items()}


def _given_splits(
    folder: Path, classes: tuple[str, ...], fractions: dict[str, float], max_pixels: int
) -> dict[Split, ImageFiles]:
    """Reads the folders `train`, `val` and `test`; without `val`, a part of `train` is held out."""
    splits = _split(
        _class_files(folder / "train", classes, max_pixels),
        {
            "val_fraction": 0.0 if (folder / "val").is_dir() else fractions["val_fraction"],
            "test_fraction": 0.0,
        },
        root=folder,
    )
    for split in ("val", "test"):
        own = folder / split
        if not own.is_dir():
            continue
        unknown = sorted(set(_subfolders(own)) - set(classes))
        if unknown:
            raise ValueError(
                f"every class needs training images, got {', '.join(unknown)} in {own} and not in "
                f"{folder / 'train'}. Move or rename these folders."
            )
        splits[split] = _class_files(own, classes, max_pixels)
        if not splits[split]:
            raise ValueError(
                f"a folder {split!r} must hold images in subfolders of classes, got none in {own}. "
                "Add some, or remove the folder."
            )
    return splits


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _subfolders(folder)
    if len(names) < 2:
        raise ValueError(
            f"a folder of images needs a subfolder for each of two or more classes, got "
            f"{', '.join(names) or 'none'} in {folder}. Put the images of class NAME into "
            f"{folder / 'NAME'}."
        )
    return names


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(
        sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    )


def _class_files(folder: Path, classes: tuple[str, ...], max_pixels: int) -> ImageFiles:
    files = [
        (str(path), number)
        for number, name in enumerate(classes)
        for path in _image_paths(folder / name)
    ]
    return ImageFiles(
        names=tuple(path for path, _ in files),
        labels=tuple(number for _, number in files),
        max_pixels=max_pixels,
    )
