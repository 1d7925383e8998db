"""Windows of a token stream as batches; `loader` says what their order promises."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from .loader import FILLER, FixedLoader, SeededLoader, fair_order
from .text_packing import (
    IGNORE_INDEX,
    EpochPlan,
    PackedDocuments,
    plan_epoch,
    read_window,
)

__all__ = ["Batch", "Collate", "EvalLoader", "TrainLoader"]

Batch = dict[str, Tensor]

# Makes a batch of windows (b, m), given the seeds of their masks.
Collate = Callable[..., Batch]


class TrainLoader(SeededLoader):
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
        plan_options = {"seq_len": seq_len, "seed": seed, "shuffle_documents": shuffle_documents}
        super().__init__(
            _TrainWindows(
                packed, collate=collate, plan_options=plan_options, window_size=window_size
            ),
            num_samples=num_windows,
            unit="windows",
            order={"corpus": corpus, "seq_len": seq_len, "shuffle_documents": shuffle_documents},
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            repeat=repeat,
            num_workers=num_workers,
            pin_memory=pin_memory,
            found=f"and {packed.num_tokens:,} tokens hold {num_windows} of seq_len={seq_len}",
            cure="Use a smaller batch_size or seq_len, or more text.",
        )
        self._stride = batch_size * world_size

    def _convert(self, position: int, saved: dict[str, Any]) -> int:
        return position * saved["batch_size"] * saved["world_size"] // self._stride


class EvalLoader(FixedLoader):
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
        num_windows = (packed.num_tokens - window_size) // seq_len + 1
        super().__init__(
            _EvalWindows(packed, collate=collate, seq_len=seq_len, window_size=window_size),
            fair_order(num_windows),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


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
            if place == FILLER:
                # A confined batch is one long row.
                batch["labels"].view(len(request), -1)[row] = IGNORE_INDEX
        return batch
