"""Batches of slides: right-padded, in an order that resumes anywhere.

A batch is a dict; b slides, n tiles of the longest one, d channels:

- `tiles` (b, n, d) float32 and `coords` (b, n, 2) float32, 0 where there is no tile;
- `padding_mask` (b, n) bool, True = padding;
- `labels` (b,) int64;
- `names`, a list of b slide ids;
- `num_skipped`, the slides that could not be read for it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .classification_metrics import UNLABELLED
from .loader import (
    FILLER,
    Batch,
    EpochOrder,
    FixedLoader,
    OnError,
    SeededLoader,
    SkippingReader,
)

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
            _TrainBatches(slides, on_error=on_error, max_tiles=max_tiles, seed=seed),
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
            _EvalBatches(slides, on_error=on_error),
            range(len(slides.labels)) if indices is None else indices,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class _Batches(Dataset[Batch]):
    """Reads slides; what a request is, a subclass says."""

    def __init__(self, slides: SlideSet, *, on_error: OnError) -> None:
        self._slides = slides
        self._reader = SkippingReader(
            slides.__getitem__, num_samples=len(slides.labels), unit="slides", on_error=on_error
        )


class _TrainBatches(_Batches):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of slides)."""

    def __init__(
        self, slides: SlideSet, *, on_error: OnError, max_tiles: int | None, seed: int
    ) -> None:
        super().__init__(slides, on_error=on_error)
        self._max_tiles, self._seed = max_tiles, seed
        self._order = EpochOrder(len(slides.labels), seed=seed)

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        chosen = self._order.samples(epoch, first=first, count=count)
        found = [self._reader.read_from(index) for index in chosen]
        slides = [self._sample(epoch, index, slide) for index, slide, _ in found]
        return collate(slides, num_skipped=sum(number for *_, number in found))

    def _sample(self, epoch: int, index: int, slide: Slide) -> Slide:
        if self._max_tiles is None or len(slide.tiles) <= self._max_tiles:
            return slide
        draw = np.random.default_rng((self._seed, epoch, index))
        chosen = draw.choice(len(slide.tiles), self._max_tiles, replace=False)
        kept = torch.from_numpy(np.sort(chosen))
        return slide._replace(tiles=slide.tiles[kept], coords=slide.coords[kept])


class _EvalBatches(_Batches):
    """Makes the batch of a request, a list of places."""

    def __getitem__(self, request: list[int]) -> Batch:
        read = [None if place == FILLER else self._reader.read(place) for place in request]
        skipped = read.count(None) - request.count(FILLER)
        # A tile that the encoder can read, and that counts for nothing.
        dim = self._slides.input_dim
        filler = Slide(torch.zeros(1, dim), torch.zeros(1, 2), UNLABELLED, "")
        return collate([slide or filler for slide in read], num_skipped=skipped)
