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
from .loader import (
    Batch,
    FixedLoader,
    OnError,
    SeededLoader,
)
from .sample_batches import EvalBatches, TrainBatches

__all__ = ["EvalLoader", "Slide", "SlideSet", "TrainLoader", "collate"]


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


class TrainLoader(SeededLoader):
    """Yields epoch after epoch, each in an order that depends on seed and epoch.

    Args:
        slides: The slides.
        batch_size: Slides in a batch, for each rank.
        max_tiles: Tiles to take of a slide; a larger one gives a sample, new in each epoch, in the
            order of the file. None takes all.
        seed: Seed of the order and of the samples.
        on_error: "skip" takes the next slide for one that cannot be read; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share an epoch.
        repeat: Batches, or share of an epoch, to repeat over and over
            (`Trainer.overfit_batches`); 0 for what all others want.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.

    Raises:
        ValueError: There are fewer slides than one step takes.
    """

    def __init__(
        self,
        slides: SlideSet,
        *,
        batch_size: int,
        max_tiles: int | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        repeat: int | float = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        num_slides = len(slides.labels)
        super().__init__(
            TrainBatches(
                functools.partial(_thinned, slides, max_tiles),
                collate=collate,
                num_samples=num_slides,
                unit="slides",
                seed=seed,
                on_error=on_error,
            ),
            num_samples=num_slides,
            unit="slides",
            order={"num_slides": num_slides},
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            repeat=repeat,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class EvalLoader(FixedLoader):
    """Yields all slides once, whole, in their order; ranks share them.

    Every rank gets as many batches, and where slides are missing, one without a name or a label.

    Args:
        slides: The slides.
        batch_size: Slides in a batch, for each rank; the last one may hold fewer.
        indices: Which slides; None for all.
        on_error: "skip" leaves a slide that cannot be read out of account; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share the slides.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
    """

    def __init__(
        self,
        slides: SlideSet,
        *,
        batch_size: int,
        indices: Sequence[int] | None = None,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            EvalBatches(
                slides.__getitem__,
                collate=collate,
                filler=functools.partial(_filler, slides),
                num_samples=len(slides.labels),
                unit="slides",
                on_error=on_error,
            ),
            range(len(slides.labels)) if indices is None else indices,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


def _thinned(slides: SlideSet, max_tiles: int | None, place: int, seed: tuple[int, ...]) -> Slide:
    """Reads a slide, and takes a sample of its tiles where it has too many."""
    slide = slides[place]
    if max_tiles is None or len(slide.tiles) <= max_tiles:
        return slide
    draw = np.random.default_rng(seed)
    chosen = draw.choice(len(slide.tiles), max_tiles, replace=False)
    kept = torch.from_numpy(np.sort(chosen))
    return slide._replace(tiles=slide.tiles[kept], coords=slide.coords[kept])


def _filler(slides: SlideSet) -> Slide:
    """Makes a slide of a tile that the encoder can read, and that counts for nothing."""
    return Slide(torch.zeros(1, slides.input_dim), torch.zeros(1, 2), UNLABELLED, "")
