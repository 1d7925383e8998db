"""Which batches a Trainer goes through, in training and in evaluations of our own."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import lightning as L

from recipes.callbacks import SkippedSamples

__all__ = ["held_out", "limited", "run_steps", "steps_per_epoch"]


def steps_per_epoch(trainer: L.Trainer) -> int:
    """Counts the optimizer steps of an epoch.

    Not by `trainer.estimated_stepping_batches`: it sets the loader up before its position is
    restored from a checkpoint.

    Args:
        trainer: The trainer, with its data module.
    """
    loader = trainer.datamodule.train_dataloader()
    batches = _num_batches(loader, trainer.limit_train_batches)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def run_steps(trainer: L.Trainer) -> float:
    """Returns the optimizer steps of a whole run, infinity where only time ends it.

    Args:
        trainer: The trainer, with its data module.
    """
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if (trainer.max_epochs or -1) > 0:
        ends.append(trainer.max_epochs * steps_per_epoch(trainer))
    return min(ends, default=math.inf)


def held_out(
    trainer: L.Trainer, split: Literal["val", "test"], *, counts_skipped: bool = False
) -> Iterator[Any]:
    """Yields the batches of a split that an evaluation is limited to, on the model's device.

    Args:
        trainer: The trainer, with its data module.
        split: Which split.
        counts_skipped: Whether what could not be read is told at the end of the fit.
    """
    data = trainer.datamodule
    if split == "val":
        batches = limited(data.val_dataloader(), trainer.limit_val_batches)
    else:
        batches = limited(data.test_dataloader(), trainer.limit_test_batches)
    counters = [x for x in trainer.callbacks if counts_skipped and isinstance(x, SkippedSamples)]
    for batch in batches:
        for counter in counters:
            counter.add(trainer, split, batch)
        yield trainer.strategy.batch_to_device(batch)


def limited(loader: Any, limit: int | float) -> Iterator[Any]:
    """Returns the batches of a loader that an evaluation is limited to.

    Args:
        loader: The loader.
        limit: As `Trainer.limit_test_batches`: an int is a number of batches, a float a share.
    """
    return itertools.islice(loader, _num_batches(loader, limit))


def _num_batches(loader: Any, limit: int | float) -> int:
    return min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
