"""Loaders of batches: for training ones that resume anywhere, for evaluation a fixed one.

The order of samples is a pure function of (seed, epoch), and a batch is a pure function of its
place in that order. So the position of a run is the number of batches it has seen, whatever the
number of workers; it is the same on all ranks, and a checkpoint of rank 0 serves them all.
Lightning saves and restores it through `state_dict` and `load_state_dict`.

These are no `torch.utils.data.DataLoader`s themselves, so that Lightning neither replaces their
order by a distributed sampler nor repeats samples to make the ranks even.
"""

import abc
import dataclasses
import itertools
import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "FILLER",
    "Batch",
    "EndlessLoader",
    "EpochOrder",
    "FixedLoader",
    "OnError",
    "SeededLoader",
    "SkippingReader",
    "batch_iterator",
    "fair_order",
]

Batch = dict[str, Any]
OnError = Literal["skip", "raise"]
Sample = TypeVar("Sample")

# Stands for a sample that counts for nothing, which evens out the number of batches on the ranks.
FILLER = -1

_HINT = "Or pass --data.on_error skip"
_log = logging.getLogger(__name__)


class EndlessLoader(abc.ABC):
    """Hands out an endless sequence of batches; each `iter()` yields the next `len(self)` of it.

    So what an epoch is to Lightning (`limit_train_batches`, a resumption in its midst or at its
    end, loaders that are asked for again) never decides which batch comes next.

    Args:
        num_batches: Batches of an epoch.
        position: Where the sequence starts.
        order: What the sequence depends on, to notice when a checkpoint has another one.
    """

    def __init__(self, *, num_batches: int, position: Any, order: dict[str, Any]) -> None:
        self._num_batches = num_batches
        self._position = position
        self._order = order
        # Lightning looks for this name to end worker processes, also after an exception.
        self._iterator: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing moves until the first batch is asked for, as Lightning calls iter()
        # more than once before it starts.
        for _ in range(len(self)):
            if self._iterator is None:
                self._iterator = self._open()
            # Counted when handed over and not when read, so that batches which workers have
            # prepared do not count.
            batch, self._position = self._step(next(self._iterator))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the position behind the last batch handed over."""
        return {"position": self._position, "order": dict(self._order)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a position; warns if it belongs to another sequence."""
        saved = state_dict["order"]
        sizes = ("batch_size", "world_size")
        if _product(saved, sizes) == _product(self._order, sizes):
            # Other processes take the samples of a step, but each step has the same ones.
            saved = {**saved, **{name: self._order[name] for name in sizes if name in saved}}
        changed = [
            f"{name} {saved.get(name)!r} -> {value!r}"
            for name, value in self._order.items()
            if saved.get(name) != value
        ]
        if changed:
            warnings.warn(
                f"the checkpoint was trained on data in another order: {', '.join(changed)}. "
                "Training goes on, but will not see the batches that the saved run would have.",
                stacklevel=2,
            )
        self._position = self._convert(state_dict["position"], saved)
        self._iterator = None

    @abc.abstractmethod
    def _open(self) -> Iterator[Any]:
        """Returns an iterator that starts at the position."""

    @abc.abstractmethod
    def _step(self, item: Any) -> tuple[Batch, Any]:
        """Returns the batch in an item of the iterator, and the position behind it."""

    def _convert(self, position: Any, saved: dict[str, Any]) -> Any:
        """Returns a position of a sequence with the order `saved` as one of this sequence."""
        return position


class SeededLoader(EndlessLoader):
    """Yields epoch after epoch, each in an order that depends on seed and epoch.

    Its position is the number of batches so far.

    Args:
        dataset: Makes the batch of a request (epoch, first place in the epoch's order, number of
            samples).
        num_samples: Samples of an epoch; those that fill no step are left out.
        unit: What samples are called.
        order: What the order depends on besides batch_size, world_size and seed.
        batch_size: Samples in a batch, for each rank.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes that share an epoch.
        repeat: Batches, or share of an epoch, to repeat over and over
            (`Trainer.overfit_batches`); 0 for what all others want.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
        found: Says for the error how many samples there are; "" takes their number.
        cure: Says for the error what helps; "" names batch_size and `unit`.

    Raises:
        ValueError: There are fewer samples than one step takes.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        *,
        num_samples: int,
        unit: str,
        order: dict[str, Any],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        repeat: int | float,
        num_workers: int,
        pin_memory: bool,
        found: str = "",
        cure: str = "",
    ) -> None:
        stride = batch_size * world_size
        if num_samples < stride:
            raise ValueError(
                f"an epoch must fill at least one step: batch_size={batch_size} on {world_size} "
                f"processes takes {stride} {unit}, {found or f'got {num_samples} for training'}. "
                + (cure or f"Use a smaller batch_size, or more {unit}.")
            )
        num_batches = num_samples // stride
        order = {**order, "batch_size": batch_size, "world_size": world_size, "seed": seed}
        super().__init__(num_batches=num_batches, position=0, order=order)
        self._dataset = dataset
        # As Lightning reads it: 1 is one batch, 1.0 is all of them; 0 or 0.0 is no repetition.
        share = 1 if isinstance(repeat, int) else num_batches
        self._requests = _Requests(
            start=0,
            num_batches=num_batches,
            num_repeated=min(math.ceil(repeat * share), num_batches),
            stride=stride,
            first=batch_size * rank,
            batch_size=batch_size,
        )
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    def _open(self) -> Iterator[Batch]:
        requests = dataclasses.replace(self._requests, start=self._position)
        return batch_iterator(self._dataset, requests, **self._workers)

    def _step(self, item: Batch) -> tuple[Batch, int]:
        return item, self._position + 1


class EpochOrder:
    """The order of samples in each epoch, mixed by seed and epoch.

    Args:
        num_samples: Number of samples.
        seed: Seed of the order.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        self._num_samples, self._seed = num_samples, seed
        self._orders: dict[int, np.ndarray] = {}

    def samples(self, epoch: int, *, first: int, count: int) -> list[int]:
        """Returns the samples at the places from `first` on in the order of an epoch.

        Args:
            epoch: Number of the epoch.
            first: The first place.
            count: Number of places.
        """
        if epoch not in self._orders:
            # Only the present epoch is kept.
            order = np.random.default_rng((self._seed, epoch)).permutation(self._num_samples)
            self._orders = {epoch: order}
        return self._orders[epoch][first : first + count].tolist()


class FixedLoader:
    """Yields the same batches every time, and as many on every rank.

    Where samples are missing for that, the last one of a rank is a `FILLER`.

    Args:
        dataset: Makes the batch of a request, a list of samples.
        samples: All samples in their order.
        batch_size: Samples in a batch, for each rank; the last batch may hold fewer.
        rank: Number of this process.
        world_size: Number of processes that share the samples.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        samples: Sequence[int],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        own = [*samples, *[FILLER] * (-len(samples) % world_size)][rank::world_size]
        self._requests = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        self._dataset = dataset
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        # Lightning looks for this name to end worker processes, also after an exception.
        self._iterator: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = batch_iterator(self._dataset, self._requests, **self._workers)
        yield from self._iterator


class SkippingReader(Generic[Sample]):
    """Reads samples, and logs those that cannot be read or stops at them.

    Args:
        read: Reads the sample at a place; OSError and ValueError, which name the file, say that it
            cannot be read.
        num_samples: Number of samples.
        unit: What samples are called.
        on_error: "skip" or "raise".
    """

    def __init__(
        self, read: Callable[[int], Sample], *, num_samples: int, unit: str, on_error: OnError
    ) -> None:
        self._read, self._num_samples = read, num_samples
        self._unit, self._on_error = unit, on_error

    def read(self, place: int) -> Sample | None:
        """Returns a sample, or None if it is to be skipped.

        Raises:
            ValueError: It cannot be read, and `on_error` is "raise".
        """
        try:
            return self._read(place)
        except (OSError, ValueError) as error:
            if self._on_error == "raise":
                if _HINT in str(error):  # of the reader of a part
                    raise
                raise ValueError(
                    f"{error} ({_HINT}, which goes on without such {self._unit}.)"
                ) from error
            _log.warning("skipped: %s", error)
            return None

    def read_from(self, place: int) -> tuple[int, Sample, int]:
        """Reads a sample, or the next one that can be read.

        Returns:
            Its place, the sample, and how many were skipped.

        Raises:
            ValueError: As for `read`, or none can be read.
        """
        places = itertools.chain(range(place, self._num_samples), range(place))
        for num_skipped, other in enumerate(places):
            sample = self.read(other)
            if sample is not None:
                return other, sample, num_skipped
        raise ValueError(
            f"none of the {self._num_samples} training {self._unit} can be read; the log says why."
        )


def fair_order(num_samples: int) -> list[int]:
    """Returns a mixed order that is always the same, so that its front is a fair sample.

    It does not follow the seed of a run: figures must be comparable.

    Args:
        num_samples: Number of samples.
    """
    return np.random.default_rng(num_samples).permutation(num_samples).tolist()


def batch_iterator(
    dataset: Dataset, requests: Iterable[Any] | None, *, num_workers: int, pin_memory: bool
) -> Iterator[Any]:
    """Reads batches, in worker processes if asked, in order.

    Args:
        dataset: Makes a whole batch from a request, or is iterable.
        requests: What to ask of it; None for one that is iterable.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.

    Returns:
        The batches.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without its own generator it would draw from the global one, and so change dropout.
        generator=torch.Generator(),
        worker_init_fn=_ignore_sigterm,
    )
    return iter(loader)


def _ignore_sigterm(worker: int) -> None:
    # torchrun and SLURM send it to workers too, which the training needs until it has saved.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _product(numbers: dict[str, Any], names: Sequence[str]) -> int:
    return math.prod(numbers.get(name, 1) for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Requests:
    """What to ask of a training dataset, without end.

    Holds no reference to the loader: in a cycle, worker processes would not end with it.

    Attributes:
        start: Position of the first batch.
        num_batches: Batches of an epoch.
        num_repeated: Batches to repeat over and over; 0 for none.
        stride: Samples of a step on all ranks.
        first: Place of this rank's first sample in a step.
        batch_size: Samples of a step on this rank.
    """

    start: int
    num_batches: int
    num_repeated: int
    stride: int
    first: int
    batch_size: int

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for position in itertools.count(self.start):
            count = position % self.num_repeated if self.num_repeated else position
            epoch, batch = divmod(count, self.num_batches)
            yield epoch, batch * self.stride + self.first, self.batch_size
