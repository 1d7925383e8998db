"""Batches of slides: right-padded, in an order that resumes anywhere.

A batch is a dict; b slides, n tiles of the longest one, d channels:

- `tiles` (b, n, d) float32 and `coords` (b, n, 2) float32, 0 where there is no tile;
- `padding_mask` (b, n) bool, True = padding;
- `labels` (b,) int64;
- `names`, a list of b slide ids.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .text_loader import EndlessLoader, batch_iterator

__all__ = ["EvalLoader", "Slide", "SlideSet", "TrainLoader", "collate"]

Batch = dict[str, Any]


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


class TrainLoader(EndlessLoader):
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
        num_slides, stride = len(slides.labels), batch_size * world_size
        if num_slides < stride:
            raise ValueError(
                f"an epoch must fill at least one step: batch_size={batch_size} on {world_size} "
                f"processes takes {stride} slides, got {num_slides} for training. Use a smaller "
                "batch_size."
            )
        order = {"num_slides": num_slides, "batch_size": batch_size, "world_size": world_size}
        num_batches = num_slides // stride
        super().__init__(num_batches=num_batches, position=0, order={**order, "seed": seed})
        self._dataset = _TrainBatches(slides, max_tiles=max_tiles, seed=seed)
        self._first, self._stride, self._batch_size = batch_size * rank, stride, batch_size
        # As Lightning reads it: 1 is one batch, 1.0 is all of them; 0 or 0.0 is no repetition.
        repeated = math.ceil(repeat * (1 if isinstance(repeat, int) else num_batches))
        self._num_repeated = min(repeated, num_batches)
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    def _open(self) -> Iterator[Batch]:
        repeated, batches, stride = self._num_repeated, len(self), self._stride
        first, count = self._first, self._batch_size
        places = (p % repeated if repeated else p for p in itertools.count(self._position))
        # No reference to the loader: in a cycle, worker processes would not end with it.
        requests = ((p // batches, p % batches * stride + first, count) for p in places)
        return batch_iterator(self._dataset, requests, **self._workers)

    def _step(self, item: Batch) -> tuple[Batch, int]:
        return item, self._position + 1


class EvalLoader:
    """Yields all slides once, whole, in their order; ranks share them.

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
        own = list(range(len(slides.labels)) if indices is None else indices)[rank::world_size]
        self._requests = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        self._dataset = _EvalBatches(slides)
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        # Lightning looks for this name to end worker processes, also after an exception.
        self._iterator: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = batch_iterator(self._dataset, self._requests, **self._workers)
        yield from self._iterator


class _TrainBatches(Dataset[Batch]):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of slides)."""

    def __init__(self, slides: SlideSet, *, max_tiles: int | None, seed: int) -> None:
        self._slides, self._max_tiles, self._seed = slides, max_tiles, seed
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        if epoch not in self._orders:
            # Only the present epoch is kept.
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._slides.labels))
            self._orders = {epoch: order}
        chosen = self._orders[epoch][first : first + count].tolist()
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
        return collate([self._slides[index] for index in request])
