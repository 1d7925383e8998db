"""Bags of tiles with a label that needs positions, cut from one real slide: a demonstration.

The slide is a skin section, stained with haematoxylin and eosin (`assets/slide/PROVENANCE.md`).
A bag is a window of 16 x 16 tiles of 16 x 16 pixels, without those that show only glass. Its class
is the quadrant with the most haematoxylin, summed over its tiles; windows where the second quadrant
comes close are left out. Every window is shown in its 8 orientations. So the classes are equally
frequent, and as no statistic of a tile depends on its orientation, the 8 bags of a window hold the
same embeddings: whatever ignores where they lie is right in 1 of 4 cases.

The statistics of a tile (27 channels, standardised with the tissue of the training rows):

- mean and standard deviation of red, green and blue in [0, 1];
- mean and standard deviation of their optical densities, -ln((value + 1) / 256);
- mean, standard deviation and 90th percentile of three stains (haematoxylin, eosin, rest): the
  optical densities times the inverse of the stain matrix of Ruifrok and Johnston (Anal. Quant.
  Cytol. Histol. 23:291, 2001), negative values set to 0;
- of the grey value: 10th, 50th and 90th percentile, and mean, standard deviation and 90th
  percentile of the gradient's length.

The slide is split by height, with a gap between the parts. It is one slide: what is
measured here says nothing about other slides.
"""

import functools
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from .slide_loader import Slide

__all__ = ["DEMO_CLASSES", "TILE_SIZE", "DemoSlides", "Split", "label_of_window"]

Split = Literal["train", "val", "test"]

DEMO_CLASSES = ("top left", "top right", "bottom left", "bottom right")
# Pixels at the slide's 20x.
TILE_SIZE = 16

_SLIDE = Path(__file__).parent / "assets" / "slide" / "cmu_small_region.svs"
_WINDOW = 16  # tiles
_MIN_TILES = 64
_MIN_RATIO = 1.2
_ORIENTATIONS = 8
# Optical densities of red, green and blue: haematoxylin, eosin, DAB.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
_GLASS_DENSITY = 0.12
# Rows of the slide in percent, and tiles between two windows.
_PARTS: dict[Split, tuple[int, int, int]] = {
    "train": (0, 58, 1),
    "val": (67, 82, 4),
    "test": (85, 100, 4),
}


class DemoSlides:
    """The bags of one part of the slide.

    Args:
        split: "train", "val" or "test".
    """

    input_dim = 27

    def __init__(self, split: Split) -> None:
        self._grid = grid = _tile_grid()
        low, high, stride = _PARTS[split]
        rows, columns = grid.tissue.shape
        self._windows = [
            (row, column)
            for row in range(rows * low // 100, rows * high // 100 - _WINDOW + 1, stride)
            for column in range(0, columns - _WINDOW + 1, stride)
            if self._is_clear(row, column)
        ]
        self.labels = [
            label_of_window(_turn(self._density(*window), orientation))[0]
            for window in self._windows
            for orientation in range(_ORIENTATIONS)
        ]

    def __getitem__(self, index: int) -> Slide:
        number, orientation = divmod(index, _ORIENTATIONS)
        row, column = self._windows[number]
        part = np.s_[row : row + _WINDOW, column : column + _WINDOW]
        tissue = _turn(self._grid.tissue[part], orientation)
        tiles = _turn(self._grid.statistics[part], orientation)[tissue]
        y, x = np.nonzero(tissue)
        coords = np.stack([x, y], axis=1).astype(np.float32) * TILE_SIZE
        name = f"row {row} column {column} orientation {orientation}"
        return Slide(torch.from_numpy(tiles), torch.from_numpy(coords), self.labels[index], name)

    def _density(self, row: int, column: int) -> np.ndarray:
        return self._grid.density[row : row + _WINDOW, column : column + _WINDOW]

    def _is_clear(self, row: int, column: int) -> bool:
        tissue = self._grid.tissue[row : row + _WINDOW, column : column + _WINDOW]
        return (
            int(tissue.sum()) >= _MIN_TILES
            and label_of_window(self._density(row, column))[1] >= _MIN_RATIO
        )


def label_of_window(density: np.ndarray) -> tuple[int, float]:
    """Returns the quadrant with the most stain, and how much more it has than the second one.

    Args:
        density: Haematoxylin of each tile, 0 for glass, (height, width), both even.

    Returns:
        Index into `DEMO_CLASSES`, and a ratio of 1 or more.
    """
    height, width = density.shape
    sums = density.reshape(2, height // 2, 2, width // 2).sum(axis=(1, 3)).ravel()
    second, first = np.sort(sums)[-2:]
    return int(sums.argmax()), float(first / max(second, 1e-6))


class _TileGrid(NamedTuple):
    """Statistics (rows, columns, channels), which tiles show tissue, and their haematoxylin."""

    statistics: np.ndarray
    tissue: np.ndarray
    density: np.ndarray


@functools.cache
def _tile_grid() -> _TileGrid:
    """Cuts the slide into tiles."""
    with Image.open(_SLIDE) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    optical = -np.log((pixels + 1) / 256)
    stains = np.clip(optical @ np.linalg.inv(_STAINS), 0, None)
    grey = pixels.mean(axis=2) / 255
    slope = np.hypot(*np.gradient(grey))
    rgb, optical, stains, grey, slope = (
        _tiles(x) for x in (pixels / 255, optical, stains, grey[..., None], slope[..., None])
    )
    tissue = optical.mean(axis=(2, 3)) > _GLASS_DENSITY
    statistics = np.concatenate(
        [
            *(reduce(x, axis=2) for x in (rgb, optical, stains) for reduce in (np.mean, np.std)),
            _percentile(stains, 90),
            *(_percentile(grey, q) for q in (10, 50, 90)),
            *(slope.mean(axis=2), slope.std(axis=2), _percentile(slope, 90)),
        ],
        axis=-1,
    )
    last = len(tissue) * _PARTS["train"][1] // 100
    known = statistics[:last][tissue[:last]]
    statistics = (statistics - known.mean(axis=0)) / known.std(axis=0)
    density = np.where(tissue, stains[..., 0].mean(axis=2), 0)
    return _TileGrid(statistics.astype(np.float32), tissue, density)


def _tiles(pixels: np.ndarray) -> np.ndarray:
    """Returns (rows, columns, pixels of a tile, channels) of an image (height, width, channels)."""
    rows, columns = pixels.shape[0] // TILE_SIZE, pixels.shape[1] // TILE_SIZE
    pixels = pixels[: rows * TILE_SIZE, : columns * TILE_SIZE]
    split = pixels.reshape(rows, TILE_SIZE, columns, TILE_SIZE, -1)
    return split.transpose(0, 2, 1, 3, 4).reshape(rows, columns, TILE_SIZE**2, -1)


def _percentile(tiles: np.ndarray, q: int) -> np.ndarray:
    return np.percentile(tiles, q, axis=2)


def _turn(grid: np.ndarray, orientation: int) -> np.ndarray:
    """Returns one of the 8 orientations of a grid (rows, columns, ...)."""
    grid = np.rot90(grid, orientation % 4)
    return grid[:, ::-1] if orientation >= 4 else grid
