"""Callbacks that every recipe uses: resumption, checkpoints, throughput, time, skipped samples."""

import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from recipes.data_ranks import counts_samples

__all__ = ["ExactResumption", "LastCheckpoint", "RunClock", "SkippedSamples", "Throughput"]

_STAGES = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}


class ExactResumption(Callback):
    """Makes the random numbers of each training step depend on seed, step and rank alone.

    A saved generator state is right only if nothing draws between the save and the next step, yet
    validation, a new epoch and the loader's workers all do. Seeding every step leaves nothing to
    go wrong: a resumed run draws the same dropout as an unbroken one, on each rank, however often
    it validates.
    """

    def __init__(self) -> None:
        self._seed: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the seed of the run, unless a checkpoint brought one.

        Lightning 2.6 forgets the loader's state where a run was saved at the end of an epoch and
        goes on for more epochs, and would then begin again with the order of the first one.
        """
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**32
        loop = trainer.fit_loop
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds Python, NumPy and PyTorch for this batch, and sets the loggers' step right."""
        assert self._seed is not None
        # Lightning counts one too many where a run ended with a validation and is made longer.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        seed = _mix(self._seed, batches, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed, which may have been chosen by chance."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the seed of the run that is resumed."""
        self._seed = state_dict["seed"]


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`: every so many steps, at SIGTERM, and when training ends.

    Lightning's own class leaves out the steps after the last multiple, and appends -v1, -v2, ...
    when a recipe runs again. Lightning itself stops at SIGTERM without saving, also between two
    batches whose gradients add up.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, *, every_n_train_steps: int = 100) -> None:
        super().__init__(
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._is_terminated = self._may_stop = False
        self._step = 0

    @property
    def state_key(self) -> str:
        """Names the state, so that a resumed run may save more or less often."""
        return "LastCheckpoint"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes SIGTERM over from Lightning, which puts its handler back at the end."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops after SIGTERM, when the step before is saved, validated and logged."""
        if self._may_stop:
            raise SIGTERMException

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves if it is time, and after SIGTERM at the end of an optimizer step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        has_stepped, self._step = trainer.global_step != self._step, trainer.global_step
        # The signal may reach one process only.
        if has_stepped and trainer.strategy.reduce_boolean_decision(self._is_terminated, all=False):
            self._save(trainer)
            self._may_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what came after the last multiple."""
        self._save(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Says how to go on. It saves nothing: a step cut in two could not be resumed exactly."""
        is_stop = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if is_stop and trainer.is_global_zero:
            saved = self.last_model_path
            print(f"Resume {saved} with --ckpt_path last." if saved else "Nothing is saved yet.")

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        self._is_terminated = True

    def _save(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class RunClock(Callback):
    """Counts the seconds since a fit began, and those before it was resumed."""

    def __init__(self) -> None:
        self._start = time.time()
        self._seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """The time spent so far."""
        return self._seconds_before + time.time() - self._start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.time()

    def state_dict(self) -> dict[str, Any]:
        """Returns the time spent so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds the time of the run that is resumed."""
        self._seconds_before = state_dict["seconds"]


class Throughput(Callback):
    """Logs `tokens_per_second` of training, without validation, over the last steps.

    Also keeps `train_seconds`, the time spent in training steps, across resumptions.

    Args:
        window: Batches to average over.
        unit: What is counted, as in `tokens_per_second`.
        count: Returns how many of it a batch holds; None counts the elements of `tokens`.
    """

    def __init__(
        self,
        *,
        window: int = 10,
        unit: str = "tokens",
        count: Callable[[Any], int] | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be 1 or more, got {window}.")
        self._name = f"{unit}_per_second"
        self._count = count or (lambda batch: batch["tokens"].numel())
        self.train_seconds = 0.0
        self._last: float | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=window)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock at the first batch and after a pause."""
        if self._last is None:
            self._last = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures from the end of one batch to the end of the next, so waiting for data counts."""
        now = time.perf_counter()
        assert self._last is not None
        seconds, self._last = now - self._last, now
        self.train_seconds += seconds
        self._recent.append((seconds, self._count(batch) * trainer.world_size))
        elapsed, number = (sum(column) for column in zip(*self._recent, strict=True))
        pl_module.log(self._name, number / elapsed)
        pl_module.log("train_seconds", self.train_seconds)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the time spent so far."""
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds the time of the run that is resumed."""
        self.train_seconds = state_dict["train_seconds"]


class SkippedSamples(Callback):
    """Says at the end how many samples were skipped, of which the log has one line each.

    Training counts from where it was started or resumed, validation the last time it ran. Samples
    of an evaluation that only fill a batch are among those that there were.

    Args:
        unit: What samples are called.
        count: Returns how many samples a batch holds.
    """

    def __init__(self, *, unit: str, count: Callable[[Any], int]) -> None:
        self._unit, self._count = unit, count
        self._totals: dict[str, Tensor] = {}

    def add(self, trainer: L.Trainer, stage: str, batch: Any) -> None:
        """Counts a batch.

        Args:
            trainer: The trainer.
            stage: "train", "val", "test" or "predict".
            batch: A batch; in training other samples took the place of those that were skipped.
        """
        if "num_skipped" not in batch:  # data of one's own may have nothing to skip
            return
        # On the device, which is not waited for.
        skipped = batch["num_skipped"].detach()
        sums = torch.stack([skipped, skipped * (stage == "train") + self._count(batch)])
        self._totals[stage] = self._totals.get(stage, 0) + sums * counts_samples(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Counts a batch."""
        self.add(trainer, "train", args[2])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins a new sum."""
        self._totals.pop("val", None)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Counts a batch."""
        self.add(trainer, "val", args[2])

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Counts a batch."""
        self.add(trainer, "test", args[2])

    def on_predict_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Counts a batch."""
        self.add(trainer, "predict", args[2])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the sums of training and validation."""
        self._print(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the sum of the test of a report."""
        self._print(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the sum, unless this is a part of a training."""
        if trainer.state.fn == "validate":
            self._print(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the sum."""
        self._print(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the sum."""
        self._print(trainer)

    def _print(self, trainer: L.Trainer) -> None:
        totals, self._totals = self._totals, {}
        for stage, sums in totals.items():
            skipped, number = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            if skipped and trainer.is_global_zero:
                print(
                    f"skipped {skipped:,} of {number:,} {self._unit} in {_STAGES[stage]}; the log "
                    "says which"
                )


def _mix(*numbers: int) -> int:
    """Returns a 32-bit number in which a change of any input changes about half of the bits."""
    mixed = 0
    for number in numbers:
        # splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**32
