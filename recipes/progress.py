"""How far a training is: one line that is redrawn in a terminal, a line now and then elsewhere.

Lightning's own bars count epochs, which mean nothing where steps end a run, and need six lines for
three metrics in a terminal of 80 columns.
"""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["LineProgress", "StepBar", "progress_text"]


class StepBar(ProgressBar):
    """Draws a bar over the optimizer steps of a training."""

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._progress: Progress | None = None

    def disable(self) -> None:
        """Draws nothing, on all processes but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Draws."""
        self._is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        # Text of a model may look like rich's markup.
        console = self._progress.console if self._progress is not None else Console()
        console.print(*args, markup=False, highlight=False, **kwargs)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins at the step that is resumed."""
        if not self._is_enabled:
            return
        columns = (
            *(MofNCompleteColumn(), BarColumn(bar_width=None, pulse_style="bar.back")),
            *(TextColumn("{task.fields[text]}", markup=False), TimeElapsedColumn()),
            *(TextColumn("<"), TimeRemainingColumn()),
        )
        self._progress = Progress(*columns, console=Console(file=sys.stdout), expand=True)
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._task = self._progress.add_task(
            "", total=total, completed=trainer.global_step, text=""
        )
        self._progress.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves on."""
        self._update(trainer, progress_text(trainer, pl_module))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says why nothing moves."""
        self._update(trainer, "validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the new figure."""
        self._update(trainer, progress_text(trainer, pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the last state standing."""
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Gives the terminal back."""
        self._stop()

    def _update(self, trainer: L.Trainer, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, text=text)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class LineProgress(Callback):
    """Prints a line now and then, where a bar cannot be drawn: log files and pipes.

    Args:
        every_seconds: Least time between two lines.
    """

    def __init__(self, *, every_seconds: float = 15.0) -> None:
        self._every_seconds = every_seconds
        self._last = float("-inf")
        self._step: int | None = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prints the newest values, if the last line is old enough."""
        if time.perf_counter() - self._last >= self._every_seconds:
            self._print(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers that there is something new to say of the same step."""
        self._step = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the last values, with those of the last validation."""
        if self._step != trainer.global_step:
            self._print(trainer, pl_module)

    def _print(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        text = progress_text(trainer, task)
        # There is no text before the first whole step of accumulated batches.
        if not text or not trainer.is_global_zero:
            return
        self._last, self._step = time.perf_counter(), trainer.global_step
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        print(f"step {trainer.global_step}{total}  {text}", flush=True)


def progress_text(trainer: L.Trainer, task: Any) -> str:
    """Returns the newest metrics in a few words: the task's own, or name and value of each."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if hasattr(task, "progress_text"):
        return task.progress_text(metrics)
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
