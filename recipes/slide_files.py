"""Reads the tile embeddings of a slide and their coordinates, as tile encoders leave them.

One file is one slide. Formats: `.h5` / `.hdf5` (CLAM, TRIDENT), `.pt` / `.pth` (GigaPath's
pipeline), `.safetensors` and `.npz`, with one name of each row:

    tiles     features, feats, tile_embeds, embeddings
    coords    coords, coordinates

Both may have a leading batch axis of 1. Shapes: n tiles of a slide, d channels of an embedding.
"""

import contextlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["COORDS_KEYS", "SUFFIXES", "TILES_KEYS", "list_slides", "read_layout", "read_slide"]

TILES_KEYS = ("features", "feats", "tile_embeds", "embeddings")
COORDS_KEYS = ("coords", "coordinates")


class _Entry(NamedTuple):
    """An array in a file: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def list_slides(folder: str | Path) -> dict[str, Path]:
    """Finds the slides in a folder.

    Args:
        folder: Its files are slides, named SLIDE_ID.SUFFIX; other suffixes are left alone.

    Returns:
        For each slide id its file, in the order of the file names.

    Raises:
        ValueError: There is no such folder, it holds no slide, or two files share an id.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"slides lie in a folder, got {str(folder)!r}, which is none.")
    slides: dict[str, Path] = {}
    for path in sorted(Path(folder).iterdir()):
        # Hidden files are what other systems leave beside a copied one.
        if path.suffix in SUFFIXES and not path.name.startswith("."):
            if path.stem in slides:
                raise ValueError(
                    "a slide must be one file, got "
                    f"{slides[path.stem].name} and {path.name} in {folder}. Remove one of them."
                )
            slides[path.stem] = path
    if not slides:
        raise ValueError(f"{folder} must hold files that end in {SUFFIXES}, got none.")
    return slides


def read_slide(path: str | Path) -> tuple[Tensor, Tensor]:
    """Reads a slide.

    Args:
        path: A file of one of the formats above.

    Returns:
        Tile embeddings (n, d) and coordinates (n, 2), in the file's order, both float32, in which
        pixels below 2**24 are exact.

    Raises:
        ValueError: The file is damaged, of another layout, empty, or holds NaN or infinity.
        RuntimeError: The file is HDF5 and h5py is not installed.

    Example:
        >>> tiles, coords = read_slide("embeddings/slide_1.h5")
        >>> embedding = encoder(tiles[None], coords[None])
    """
    with _arrays(Path(path)) as (tiles, coords):
        return _finite(path, "tiles", tiles), _finite(path, "coords", coords)


def read_layout(path: str | Path) -> tuple[int, Tensor]:
    """Reads what can be read without the tiles, except in formats that come as a whole.

    Args:
        path: As for `read_slide`.

    Returns:
        Channels of a tile embedding, and the coordinates as for `read_slide`.

    Raises:
        ValueError: As for `read_slide`, but for tiles that are not finite.
        RuntimeError: As for `read_slide`.
    """
    with _arrays(Path(path)) as (tiles, coords):
        return tiles.shape[-1], _finite(path, "coords", coords)


def _finite(path: str | Path, name: str, entry: _Entry) -> Tensor:
    """Reads an array as (n, ...) float32."""
    values = _without_batch(entry.read()).to(torch.float32)
    is_bad = ~torch.isfinite(values).all(dim=1)
    if is_bad.any():
        raise ValueError(
            f"{path}: {name} must be finite, got NaN or infinity in {int(is_bad.sum())} of "
            f"{len(values)} rows, the first is row {int(is_bad.nonzero()[0])}. Compute the "
            "embeddings of this slide again."
        )
    return values


@contextlib.contextmanager
def _arrays(path: Path) -> Iterator[tuple[_Entry, _Entry]]:
    """Opens a slide and checks names and shapes."""
    if path.suffix not in _OPENERS:
        raise ValueError(f"a slide must be a file of {SUFFIXES}, got {str(path)!r}.")
    if not path.is_file():
        raise ValueError(f"a slide must be an existing file, got {str(path)!r}.")
    with _OPENERS[path.suffix](path) as entries:
        tiles, coords = (_pick(path, entries, keys) for keys in (TILES_KEYS, COORDS_KEYS))
        sizes = [
            entry.shape[1:] if _has_batch(entry.shape) else entry.shape for entry in (tiles, coords)
        ]
        if len(sizes[0]) != 2 or sizes[1] != (sizes[0][0], 2) or 0 in sizes[0]:
            raise ValueError(
                f"{path}: tiles must be (n, d) and coords (n, 2) with n and d of 1 or more, got "
                f"{tiles.shape} and {coords.shape}. A leading axis of 1 may come before."
            )
        yield tiles, coords


def _pick(path: Path, entries: dict[str, _Entry], keys: tuple[str, ...]) -> _Entry:
    """Returns the one entry with a name we know."""
    found = [key for key in keys if key in entries]
    if len(found) != 1:
        raise ValueError(
            f"{path} must hold exactly one of {keys}, got {found or 'none'} among its entries "
            f"{sorted(entries)}. Rename the one to use, and write it as a plain array."
        )
    return entries[found[0]]


def _has_batch(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] == 1


def _without_batch(values: Tensor) -> Tensor:
    return values[0] if _has_batch(tuple(values.shape)) else values


@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator[dict[str, _Entry]]:
    try:
        import h5py
    except ImportError as error:
        raise RuntimeError(
            f"{path.name} needs h5py, which is not installed: pip install h5py"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _damaged(path, error) from error
    with file:
        yield {
            name: _Entry(item.shape, lambda item=item: torch.from_numpy(_native(item[...])))
            for name, item in file.items()
            if isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf"
        }


@contextlib.contextmanager
def _open_torch(path: Path) -> Iterator[dict[str, _Entry]]:
    try:
        # Only the zip format of today can be read piece by piece.
        is_zip = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise _damaged(
            path, error, cure="Store tensors or lists; other objects are not read."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a dict of {TILES_KEYS} and {COORDS_KEYS}, got a "
            f"{type(content).__name__}: without coordinates there are no positions."
        )
    tensors = {str(name): _as_tensor(value) for name, value in content.items()}
    yield {
        name: _Entry(tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
        if tensor is not None
    }


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[dict[str, _Entry]]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    with file:
        yield {
            name: _Entry(
                tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name)
            )
            for name in file.keys()  # noqa: SIM118 - not iterable itself
        }


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[dict[str, _Entry]]:
    try:
        # NumPy leaves a file open that it cannot read.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    yield {
        name: _Entry(array.shape, lambda array=array: torch.from_numpy(_native(array)))
        for name, array in arrays.items()
        if array.dtype.kind in "iuf"
    }


_OPENERS = {
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".safetensors": _open_safetensors,
    ".npz": _open_npz,
}
SUFFIXES = tuple(_OPENERS)


def _native(array: np.ndarray) -> np.ndarray:
    """Returns an array in a type that PyTorch knows."""
    if array.dtype.kind == "f":
        return np.asarray(array, dtype=np.float32)
    return np.asarray(array, dtype=np.int64)


def _as_tensor(value: Any) -> Tensor | None:
    """Returns a tensor, or lists of numbers or of tensors, as a tensor; None for other things."""
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return torch.stack(list(value))
        return torch.tensor(value)
    # PyTorch's ways to say that it is no array: text, dicts, lists of unequal length.
    except (TypeError, ValueError, RuntimeError):
        return None


def _damaged(path: Path, error: Exception, *, cure: str = "Write it again.") -> ValueError:
    reason = str(error).strip().splitlines()
    return ValueError(
        f"{path} is damaged, or no {path.suffix} file at all "
        f"({reason[0] if reason else type(error).__name__}). {cure}"
    )
