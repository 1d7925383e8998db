"""Batches of samples that are read one by one, in an order that resumes anywhere.

What a training sample looks like depends on seed, epoch and the sample alone, so the number of
worker processes changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import Dataset

from .loader import (
    FILLER,
    Batch,
    EpochOrder,
    FixedLoader,
    OnError,
    SeededLoader,
    SkippingReader,
    fair_order,
)

__all__ = ["EvalLoader", "SampleSource", "Seed", "TrainLoader"]

Sample = TypeVar("Sample")
# Numbers that draw what a training sample looks like; None: as it always looks.
Seed = tuple[int, ...] | None


class Collate(Protocol):
    """Makes a batch of samples."""

    def __call__(self, samples: Sequence[Any], *, num_skipped: int = 0) -> Batch:
        """Returns the batch, with how many samples could not be read for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSource(Generic[Sample]):
    """Samples, and how a batch is made of them; all of it travels to worker processes.

    Attributes:
        read: Reads the sample at a place, as a seed draws it; OSError and ValueError, which name
            the file, say that it cannot be read.
        change: Changes a sample that was read, by its place and seed; its errors stop the run.
            None leaves samples alone.
        collate: Makes a batch.
        filler: Makes what stands for a sample that is missing, and counts for nothing.
        num_samples: Number of samples.
        unit: What samples are called.
    """

    read: Callable[[int, Seed], Sample]
    change: Callable[[Sample, int, Seed], Sample] | None = None
    collate: Collate
    filler: Callable[[], Sample]
    num_samples: int
    unit: str

    def __len__(self) -> int:
        return self.num_samples


class TrainLoader(SeededLoader):
    """Yields epoch after epoch, each in an order that depends on seed and epoch.

    Args:
        source: The samples.
        batch_size: Samples in a batch, for each rank.
        seed: Seed of the order and of what samples look like.
        on_error: "skip" takes the next sample for one that cannot be read; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share an epoch.
        repeat: Batches, or share of an epoch, to repeat over and over
            (`Trainer.overfit_batches`); 0 for what all others want.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.

    Raises:
        ValueError: There are fewer samples than one step takes.
    """

    def __init__(
        self,
        source: SampleSource[Any],
        *,
        batch_size: int,
        seed: int = 0,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        repeat: int | float = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            _TrainBatches(source, seed=seed, on_error=on_error),
            num_samples=len(source),
            unit=source.unit,
            order={f"num_{source.unit}": len(source)},
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            repeat=repeat,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class EvalLoader(FixedLoader):
    """Yields every sample once as it always looks.

    Every rank gets as many batches, and where samples are missing, one that counts for nothing.

    Args:
        source: The samples.
        batch_size: Samples in a batch, for each rank; the last batch may hold fewer.
        places: Which samples, in their order; None takes all in an order that is mixed but always
            the same, so that a limit on the number of batches takes a fair sample.
        on_error: "skip" leaves a sample that cannot be read out of account; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share the samples.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
    """

    def __init__(
        self,
        source: SampleSource[Any],
        *,
        batch_size: int,
        places: Sequence[int] | None = None,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            _EvalBatches(source, on_error=on_error),
            fair_order(len(source)) if places is None else places,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class _Batches(Dataset[Batch]):
    """Reads samples; what a request is, a subclass says."""

    def __init__(self, source: SampleSource[Any], *, on_error: OnError) -> None:
        self._source, self._on_error = source, on_error

    def _reader(self, seed_of: Callable[[int], Seed]) -> SkippingReader[Any]:
        return SkippingReader(
            lambda place: self._source.read(place, seed_of(place)),
            num_samples=len(self._source),
            unit=self._source.unit,
            on_error=self._on_error,
        )

    def _changed(self, sample: Any, place: int, seed: Seed) -> Any:
        change = self._source.change
        return sample if change is None else change(sample, place, seed)


class _TrainBatches(_Batches):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of samples)."""

    def __init__(self, source: SampleSource[Any], *, seed: int, on_error: OnError) -> None:
        super().__init__(source, on_error=on_error)
        self._seed = seed
        self._order = EpochOrder(len(source), seed=seed)

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        seed_of = functools.partial(self._seed_of, epoch)
        reader, samples, num_skipped = self._reader(seed_of), [], 0
        for chosen in self._order.samples(epoch, first=first, count=count):
            place, sample, skipped = reader.read_from(chosen)
            samples.append(self._changed(sample, place, seed_of(place)))
            num_skipped += skipped
        return self._source.collate(samples, num_skipped=num_skipped)

    def _seed_of(self, epoch: int, place: int) -> Seed:
        return self._seed, epoch, place


class _EvalBatches(_Batches):
    """Makes the batch of a request, a list of places."""

    def __getitem__(self, request: list[int]) -> Batch:
        reader, samples, num_skipped = self._reader(lambda place: None), [], 0
        for place in request:
            sample = None if place == FILLER else reader.read(place)
            if sample is None:
                num_skipped += place != FILLER
                samples.append(self._source.filler())
            else:
                samples.append(self._changed(sample, place, None))
        return self._source.collate(samples, num_skipped=num_skipped)
