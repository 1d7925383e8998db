"""Writes what a classifier came to: report.png, metrics.json and a table to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from recipes.callbacks import RunClock, Throughput
from recipes.classification import ClassificationTask
from recipes.classification_metrics import class_scores
from recipes.figures import confusion_figure, curves_figure, log_figure
from recipes.run_folder import read_curves, run_lines
from recipes.trainer_batches import held_out

__all__ = ["ClassificationReport", "class_table", "evaluate_test"]


class ClassificationReport(RunClock):
    """Tests the model when training ends, and writes a report into the run folder.

    Where the data module has no `has_test`, or nothing is held out for the test, it reports the
    last validation.

    Args:
        title: Heading of the report; None takes the name of the model.
    """

    def __init__(self, *, title: str | None = None) -> None:
        super().__init__()
        self._title = title

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tests on all processes, writes on the first; the last checkpoint is saved by then."""
        if trainer.fast_dev_run:
            return
        split = evaluate_test(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        if split in pl_module.confusions:
            self._write(trainer, pl_module, split)
        else:
            print("No report: nothing that is held out for validation or test has been read.")

    def _write(self, trainer: L.Trainer, task: ClassificationTask, split: str) -> None:
        folder = Path(trainer.default_root_dir)
        figures, counts = task.figures[split], task.confusions[split]
        names = task.shown_class_names
        title = self._title or task.hparams["model_name"]
        log_figure(trainer, f"{split}_confusion", confusion_figure(counts, names, title=title))
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        record = {
            "metrics": {
                **{f"{split}_{name}": value for name, value in figures.items()},
                "steps": trainer.global_step,
                "train_seconds": round(throughput.train_seconds, 1),
                "total_seconds": round(self.seconds, 1),
            },
            f"{split}_classes": class_scores(counts, names),
            f"{split}_confusion": counts.tolist(),
        }
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        if (folder / "metrics.csv").is_file():
            curves = read_curves(folder / "metrics.csv")
            log_figure(trainer, "report", curves_figure(curves, title=title))
        print(_summary(trainer, split, record["metrics"], class_table(counts, names)))


def evaluate_test(trainer: L.Trainer, task: ClassificationTask) -> str:
    """Tests a model in the midst of a fit, if there is something to test on.

    Args:
        trainer: The trainer; all processes must call this.
        task: The task, whose `figures` and `confusions` get the result.

    Returns:
        "test", or "val" where no test samples are held out.
    """
    if not getattr(trainer.datamodule, "has_test", False):
        return "val"
    was_training = task.training
    task.eval()
    task.metrics.reset()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in held_out(trainer, "test", counts_skipped=True):
            task.metrics.update(task.logits(batch), task.labels(batch))
    task.train(was_training)
    figures, counts = task.metrics.compute()
    if not figures:
        return "val"
    task.figures["test"], task.confusions["test"] = figures, counts
    return "test"


def class_table(counts: Tensor, names: Sequence[str]) -> str:
    """Returns samples, recall and precision of each class as a table to print."""
    width = max(len("class"), *(len(name) for name in names))
    lines = [f"{'class':<{width}}  samples  recall  precision"]
    for name, row in class_scores(counts, names).items():
        recall, precision = (
            "-" if row[key] is None else f"{row[key]:.1%}" for key in ("recall", "precision")
        )
        lines.append(f"{name:<{width}}  {row['samples']:>7,}  {recall:>6}  {precision:>9}")
    return "\n".join(lines)


def _summary(trainer: L.Trainer, split: str, metrics: dict[str, Any], table: str) -> str:
    rule = "-" * 78
    title = {"val": "Validation", "test": "Test"}[split]
    figures = {
        name.removeprefix(f"{split}_").replace("_", " "): value
        for name, value in metrics.items()
        if name.startswith(f"{split}_")
    }
    pictures = [f"{split}_confusion.png", "pattern.png", "report.png"]
    return "\n".join(
        [
            rule,
            table,
            "",
            f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()),
            *run_lines(trainer, metrics, pictures),
            rule,
        ]
    )
