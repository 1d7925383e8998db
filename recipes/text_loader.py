"""Loaders of text batches: one for training that resumes anywhere, one for evaluation.

The order of windows is a pure function of (seed, epoch), and a batch is a pure function of its
place in that order. So the position of a run is the number of batches it has seen, whatever the
number of workers; it is the same on all ranks, and a checkpoint of rank 0 serves them all.
Lightning saves and restores it through `state_dict` and `load_state_dict`.

These are no `torch.utils.data.DataLoader`s themselves, so that Lightning neither replaces their
order by a distributed sampler nor repeats windows to make the ranks even.
"""

import abc
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .text_packing import (
    IGNORE_INDEX,
    EpochPlan,
    PackedDocuments,
    plan_epoch,
    read_window,
)

__all__ = ["EndlessLoader", "EvalLoader", "TrainLoader", "batch_iterator"]

Batch = dict[str, Tensor]

# Makes a batch of windows (b, m), given the seeds of their masks.
Collate = Callable[..., Batch]

# Stands for a window without labels, which evens out the number of batches on the ranks.
_FILLER = -1


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


class TrainLoader(EndlessLoader):
    """Yields epoch after epoch of a token stream, in an order that depends on seed and epoch.

    Its position is the number of batches so far.

    Args:
        packed: Token stream.
        collate: Makes a batch of windows.
        seq_len: Context in tokens, the distance between windows.
        window_size: Tokens of a window.
        batch_size: Windows in a batch, for each rank.
        seed: Seed of the order.
        shuffle_documents: Whether each epoch brings the documents in another order.
        rank: Number of this process.
        world_size: Number of processes that share an epoch.
        repeat: Batches, or share of an epoch, to repeat over and over
            (`Trainer.overfit_batches`); 0 for what all others want.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
        corpus: Name of the text.

    Raises:
        ValueError: There are fewer windows than one step takes.
    """

    def __init__(
        self,
        packed: PackedDocuments,
        *,
        collate: Collate,
        seq_len: int,
        window_size: int,
        batch_size: int,
        seed: int,
        shuffle_documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
        repeat: int | float = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        corpus: str = "",
    ) -> None:
        num_windows = packed.num_tokens // seq_len
        self._stride = batch_size * world_size
        if num_windows < self._stride:
            raise ValueError(
                f"an epoch must fill at least one step: batch_size={batch_size} on {world_size} "
                f"processes takes {self._stride} windows, and {packed.num_tokens:,} tokens hold "
                f"{num_windows} of seq_len={seq_len}. Use a smaller batch_size or seq_len, or "
                "more text."
            )
        order = {
            "corpus": corpus,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "world_size": world_size,
            "seed": seed,
            "shuffle_documents": shuffle_documents,
        }
        num_batches = num_windows // self._stride
        super().__init__(num_batches=num_batches, position=0, order=order)
        self._dataset = _TrainWindows(
            packed,
            collate=collate,
            plan_options={
                "seq_len": seq_len,
                "seed": seed,
                "shuffle_documents": shuffle_documents,
            },
            window_size=window_size,
        )
        # As Lightning reads it: 1 is one batch, 1.0 is all of them; 0 or 0.0 is no repetition.
        share = 1 if isinstance(repeat, int) else num_batches
        self._requests = _Requests(
            start=0,
            num_batches=num_batches,
            num_repeated=min(math.ceil(repeat * share), num_batches),
            stride=self._stride,
            first=batch_size * rank,
            batch_size=batch_size,
        )
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    def _open(self) -> Iterator[Batch]:
        requests = dataclasses.replace(self._requests, start=self._position)
        return batch_iterator(self._dataset, requests, **self._workers)

    def _step(self, item: Batch) -> tuple[Batch, int]:
        return item, self._position + 1

    def _convert(self, position: int, saved: dict[str, Any]) -> int:
        return position * saved["batch_size"] * saved["world_size"] // self._stride


class EvalLoader:
    """Yields the same windows every time: the whole stream, cut without overlap.

    They come in an order that is mixed, but always the same, so that a limit on the number of
    batches takes a fair sample; masks are always the same, too. Every rank gets as many batches;
    where windows are missing, it gets one whose labels are all -100.

    Args:
        packed: Token stream.
        collate: Makes a batch of windows.
        seq_len: Context in tokens, the distance between windows.
        window_size: Tokens of a window.
        batch_size: Windows in a batch, for each rank; the last batch may hold fewer.
        rank: Number of this process.
        world_size: Number of processes that share the windows.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
    """

    def __init__(
        self,
        packed: PackedDocuments,
        *,
        collate: Collate,
        seq_len: int,
        window_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._dataset = _EvalWindows(
            packed, collate=collate, seq_len=seq_len, window_size=window_size
        )
        num_windows = (packed.num_tokens - window_size) // seq_len + 1
        # Neither order nor masks follow the seed of a run: figures must be comparable.
        order = np.random.default_rng(num_windows).permutation(num_windows)
        filled = np.full(math.ceil(num_windows / world_size) * world_size, _FILLER)
        filled[:num_windows] = order
        own = filled[rank::world_size].tolist()
        self._requests = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._iterator: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = batch_iterator(self._dataset, self._requests, **self._workers)
        yield from self._iterator


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
    )
    return iter(loader)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Requests:
    """What to ask of the training windows, without end.

    Holds no reference to the loader: in a cycle, worker processes would not end with it.

    Attributes:
        start: Position of the first batch.
        num_batches: Batches of an epoch.
        num_repeated: Batches to repeat over and over; 0 for none.
        stride: Windows of a step on all ranks.
        first: Place of this rank's first window in a step.
        batch_size: Windows of a step on this rank.
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


class _TrainWindows(Dataset[Batch]):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of windows)."""

    def __init__(
        self,
        packed: PackedDocuments,
        *,
        collate: Collate,
        plan_options: dict[str, Any],
        window_size: int,
    ) -> None:
        self._packed = packed
        self._collate = collate
        self._options = plan_options
        self._window_size = window_size
        self._plans: dict[int, EpochPlan] = {}

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        if epoch not in self._plans:
            # Only the present epoch is kept.
            self._plans = {epoch: plan_epoch(self._packed, epoch=epoch, **self._options)}
        plan = self._plans[epoch]
        places = [int(window) for window in plan.windows[first : first + count]]
        starts = [plan.offset + place * self._options["seq_len"] for place in places]
        windows = [read_window(self._packed, plan, start, self._window_size) for start in starts]
        seeds = [(self._options["seed"], 0, epoch, place) for place in places]
        return self._collate(np.stack(windows), mask_seeds=seeds)


class _EvalWindows(Dataset[Batch]):
    """Makes the batch of a request, a list of windows."""

    def __init__(
        self,
        packed: PackedDocuments,
        *,
        collate: Collate,
        seq_len: int,
        window_size: int,
    ) -> None:
        self._packed = packed
        self._collate = collate
        self._seq_len = seq_len
        self._window_size = window_size

    def __getitem__(self, request: list[int]) -> Batch:
        starts = [max(0, place) * self._seq_len for place in request]
        windows = [self._packed.tokens[start : start + self._window_size] for start in starts]
        seeds = [(0, 1, max(0, place)) for place in request]
        batch = self._collate(np.stack(windows), mask_seeds=seeds)
        for row, place in enumerate(request):
            if place == _FILLER:
                # A confined batch is one long row.
                batch["labels"].view(len(request), -1)[row] = IGNORE_INDEX
        return batch
