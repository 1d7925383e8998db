"""Batches of slides: right-padded, in an order that resumes anywhere.

A batch is a dict; b slides, n tiles of the longest one, d channels:

- `tiles` (b, n, d) float32 and `coords` (b, n, 2) float32, 0 where there is no tile;
- `padding_mask` (b, n) bool, True = padding;
- `labels` (b,) int64;
- `names`, a list of b slide ids.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .classification_metrics import UNLABELLED
from .loader import FILLER, Batch, EpochOrder, FixedLoader, SeededLoader

__all__ = ["EvalLoader", "Slide", "SlideSet", "TrainLoader", "collate"]


class Slide(NamedTuple):
    """A slide: tiles (n, d), coords (n, 2), the number of its class, and its name."""

    tiles: Tensor
    coords: Tensor
    label: int
    name: str


class SlideSet(Protocol):
    """The slides of a split, read one at a time; `labels` has the class of each."""

    labels: Sequence[int]

    def __getitem__(self, index: int) -> Slide: ...


def collate(slides: Sequence[Slide]) -> Batch:
    """Puts slides of different length into one batch.

    Args:
        slides: The slides.

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
    }


class TrainLoader(SeededLoader):
    """Yields epoch after epoch, each in an order that depends on seed and epoch.

    Args:
        slides: The slides.
        batch_size: Slides in a batch, for each rank.
        max_tiles: Tiles to take of a slide; a larger one gives a sample, new in each epoch, in the
            order of the file. None takes all.
        seed: Seed of the order and of the samples.
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
        rank: int = 0,
        world_size: int = 1,
        repeat: int | float = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        num_slides = len(slides.labels)
        super().__init__(
            _TrainBatches(slides, max_tiles=max_tiles, seed=seed),
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
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            _EvalBatches(slides),
            range(len(slides.labels)) if indices is None else indices,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class _TrainBatches(Dataset[Batch]):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of slides)."""

    def __init__(self, slides: SlideSet, *, max_tiles: int | None, seed: int) -> None:
        self._slides, self._max_tiles, self._seed = slides, max_tiles, seed
        self._order = EpochOrder(len(slides.labels), seed=seed)

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        chosen = self._order.samples(epoch, first=first, count=count)
        return collate([self._sample(epoch, index) for index in chosen])

    def _sample(self, epoch: int, index: int) -> Slide:
        slide = self._slides[index]
        if self._max_tiles is None or len(slide.tiles) <= self._max_tiles:
            return slide
        draw = np.random.default_rng((self._seed, epoch, index))
        chosen = draw.choice(len(slide.tiles), self._max_tiles, replace=False)
        kept = torch.from_numpy(np.sort(chosen))
        return slide._replace(tiles=slide.tiles[kept], coords=slide.coords[kept])


class _EvalBatches(Dataset[Batch]):
    """Makes the batch of a request, a list of places."""

    def __init__(self, slides: SlideSet) -> None:
        self._slides = slides

    def __getitem__(self, request: list[int]) -> Batch:
        return collate([self._filler() if i == FILLER else self._slides[i] for i in request])

    def _filler(self) -> Slide:
        """Returns a tile that any encoder of these slides can read, and that counts for nothing."""
        tiles, coords, _, _ = self._slides[0]
        return Slide(tiles[:1], coords[:1], UNLABELLED, "")
