"""Makes the batches that the loaders of `loader.py` ask for, of samples read one by one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import Dataset

from .loader import FILLER, Batch, EpochOrder, OnError, SkippingReader

__all__ = ["Collate", "EvalBatches", "TrainBatches"]

Sample = TypeVar("Sample")


class Collate(Protocol):
    """Makes a batch of samples, and of how many could not be read beside them."""

    def __call__(self, samples: Sequence[Any], *, num_skipped: int = 0) -> Batch:
        """Returns the batch."""


class TrainBatches(Dataset[Batch], Generic[Sample]):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of samples).

    Args:
        read: Reads the sample at a place, as the numbers (seed, epoch, place) draw it; OSError and
            ValueError, which name the file, say that it cannot be read.
        collate: Makes a batch of samples.
        num_samples: Number of samples.
        unit: What samples are called.
        seed: Seed of the order and of what is drawn.
        on_error: "skip" takes the next sample for one that cannot be read; "raise" stops at it.
    """

    def __init__(
        self,
        read: Callable[[int, tuple[int, ...]], Sample],
        *,
        collate: Collate,
        num_samples: int,
        unit: str,
        seed: int,
        on_error: OnError,
    ) -> None:
        self._read, self._collate, self._seed = read, collate, seed
        self._order = EpochOrder(num_samples, seed=seed)
        self._reader = functools.partial(
            SkippingReader, num_samples=num_samples, unit=unit, on_error=on_error
        )

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        reader = self._reader(lambda place: self._read(place, (self._seed, epoch, place)))
        places = self._order.samples(epoch, first=first, count=count)
        _, samples, skipped = zip(*map(reader.read_from, places), strict=True)
        return self._collate(samples, num_skipped=sum(skipped))


class EvalBatches(Dataset[Batch], Generic[Sample]):
    """Makes the batch of a request, a list of places.

    Args:
        read: Reads the sample at a place; as for `TrainBatches`.
        collate: Makes a batch of samples.
        filler: Makes what stands for a sample that is missing, and counts for nothing.
        num_samples: Number of samples.
        unit: What samples are called.
        on_error: "skip" counts a sample that cannot be read for nothing; "raise" stops at it.
    """

    def __init__(
        self,
        read: Callable[[int], Sample],
        *,
        collate: Collate,
        filler: Callable[[], Sample],
        num_samples: int,
        unit: str,
        on_error: OnError,
    ) -> None:
        self._collate, self._filler = collate, filler
        self._reader = SkippingReader(read, num_samples=num_samples, unit=unit, on_error=on_error)

    def __getitem__(self, request: list[int]) -> Batch:
        read = [None if place == FILLER else self._reader.read(place) for place in request]
        skipped = read.count(None) - request.count(FILLER)
        samples = [self._filler() if sample is None else sample for sample in read]
        return self._collate(samples, num_skipped=skipped)
