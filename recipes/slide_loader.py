"""Batches of slides: right-padded, in an order that resumes anywhere.

A batch is a dict; b slides, n tiles of the longest one, d channels:

- `tiles` (b, n, d) float32 and `coords` (b, n, 2) float32, 0 where there is no tile;
- `padding_mask` (b, n) bool, True = padding;
- `labels` (b,) int64;
- `names`, a list of b slide ids;
- `num_skipped`, the slides that could not be read for it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .classification_metrics import UNLABELLED
from .loader import Batch
from .sample_loader import SampleSource, Seed

__all__ = ["Slide", "SlideSet", "collate", "slide_source"]


class Slide(NamedTuple):
    """A slide: tiles (n, d), coords (n, 2), the number of its class, and its name."""

    tiles: Tensor
    coords: Tensor
    label: int
    name: str


class SlideSet(Protocol):
    """The slides of a split, read one at a time."""

    @property
    def labels(self) -> Sequence[int]:
        """Class of each slide."""

    @property
    def input_dim(self) -> int:
        """Channels of a tile embedding."""

    def __getitem__(self, index: int) -> Slide: ...


def collate(slides: Sequence[Slide], *, num_skipped: int = 0) -> Batch:
    """Puts slides of different length into one batch.

    Args:
        slides: The slides.
        num_skipped: How many could not be read for it.

    Returns:
        The batch.
    """
    lengths = torch.tensor([len(slide.tiles) for slide in slides])
    return {
        "tiles": pad_sequence([slide.tiles for slide in slides], batch_first=True),
        "coords": pad_sequence([slide.coords for slide in slides], batch_first=True),
        "padding_mask": torch.arange(int(lengths.max())) >= lengths[:, None],
        "labels": torch.tensor([slide.label for slide in slides]),
        "names": [slide.name for slide in slides],
        "num_skipped": torch.tensor(num_skipped),
    }


def slide_source(slides: SlideSet, *, max_tiles: int | None = None) -> SampleSource[Slide]:
    """Returns slides as loaders take them.

    Args:
        slides: The slides.
        max_tiles: Tiles to take of a slide in training; a larger one gives a sample, new in each
            epoch, in the order of the file. None takes all.
    """
    return SampleSource(
        read=functools.partial(_read, slides, max_tiles),
        collate=collate,
        filler=functools.partial(_filler, slides.input_dim),
        num_samples=len(slides.labels),
        unit="slides",
    )


def _read(slides: SlideSet, max_tiles: int | None, place: int, seed: Seed) -> Slide:
    slide = slides[place]
    if seed is None or max_tiles is None or len(slide.tiles) <= max_tiles:
        return slide
    draw = np.random.default_rng(seed)
    chosen = draw.choice(len(slide.tiles), max_tiles, replace=False)
    kept = torch.from_numpy(np.sort(chosen))
    return slide._replace(tiles=slide.tiles[kept], coords=slide.coords[kept])


def _filler(input_dim: int) -> Slide:
    """Makes a slide of a tile that the encoder can read, and that counts for nothing."""
    return Slide(torch.zeros(1, input_dim), torch.zeros(1, 2), UNLABELLED, "")
