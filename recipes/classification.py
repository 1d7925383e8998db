"""What all classification recipes share: loss, figures of merit, pictures, optimizer, resumption.

Shapes: b batch, c classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.callbacks import ExactResumption, SkippedSamples, Throughput
from recipes.checkpoints import check_checkpoint
from recipes.classification_metrics import (
    UNLABELLED,
    ClassificationMetrics,
    class_scores,
    log_counts,
)
from recipes.data_ranks import counts_samples
from recipes.figures import confusion_figure, log_figure, pattern_figure
from recipes.optimization import OptimizationConfig, total_grad_norm
from recipes.run_folder import update_record
from recipes.trainer_batches import run_steps, steps_per_epoch

__all__ = ["UNLABELLED", "ClassificationTask"]

Split = Literal["val", "test"]


class ClassificationTask(L.LightningModule):
    """Training, evaluation and prediction of a model whose output is a score for each class.

    A subclass sets `self.model` to a model of the registry, stores its hyperparameters
    (`model_name` and `optimization` among them), and says what is in a batch: `logits`, `labels`
    and `names`. Its data module has `class_names`, and `class_counts` (of the training samples)
    where `class_weights="balanced"` is to work.

    Args:
        num_classes: Number of classes, 2 or more.
        class_weights: Weight of each class in the training loss; "balanced" weighs by the inverse
            of the number of training samples; None weighs all alike.
        label_smoothing: Part of each training label that is spread over all classes.
        optimization: Optimizer and learning rate, by optimizer step.
        warmup_epochs: Sets `optimization.warmup_steps` for data of any size; 0 leaves it as it is.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        num_classes: int,
        class_weights: Literal["balanced"] | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        warmup_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.optimization = OptimizationConfig.of(optimization)
        self.warmup_epochs = warmup_epochs
        self._check()
        is_given = class_weights not in (None, "balanced")
        weights = torch.tensor(class_weights, dtype=torch.float32) if is_given else None
        self.register_buffer("loss_weights", weights, persistent=False)
        self.metrics = ClassificationMetrics(num_classes)
        # Confusion matrix and figures of the last evaluation of each split, for reports.
        self.confusions: dict[str, Tensor] = {}
        self.figures: dict[str, dict[str, float]] = {}
        self.class_names: tuple[str, ...] | None = None
        self._losses: list[Tensor] = []
        self._has_logged_pattern = False

    @property
    def shown_class_names(self) -> tuple[str, ...]:
        """Names of the classes, their numbers where neither data nor checkpoint name them."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    def logits(self, batch: Any) -> Tensor:
        """Returns the scores of the classes, (b, c)."""
        raise NotImplementedError(f"{type(self).__name__} must define logits(batch).")

    def labels(self, batch: Any) -> Tensor:
        """Returns the class of each sample, (b,), `UNLABELLED` where it is unknown."""
        raise NotImplementedError(f"{type(self).__name__} must define labels(batch).")

    def names(self, batch: Any) -> list[str]:
        """Returns the name of each sample, which `predict` prints; "" leaves it out."""
        raise NotImplementedError(f"{type(self).__name__} must define names(batch).")

    def training_loss(self, batch: Any) -> Tensor:
        """Returns the loss of a batch."""
        return self.loss(self.logits(batch), self.labels(batch))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy, with class weights and label smoothing.

        Args:
            logits: Scores of the classes, (b, c).
            targets: Class of each sample, (b,), or its probability of each class, (b, c).
        """
        return F.cross_entropy(
            logits.float(),
            targets,
            weight=self.loss_weights,
            ignore_index=UNLABELLED,
            label_smoothing=self.label_smoothing,
        )

    def configure_callbacks(self) -> list[L.Callback]:
        """Returns what makes a resumed run equal an unbroken one, from Python too."""
        count = lambda batch: len(self.labels(batch))  # noqa: E731
        return [
            ExactResumption(),
            Throughput(unit=self.unit, count=count),
            SkippedSamples(unit=self.unit, count=count),
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        """Makes the optimizer and its schedule, for a run of so many steps or epochs."""
        config = self.optimization
        if self.warmup_epochs:
            steps = round(self.warmup_epochs * steps_per_epoch(self.trainer))
            config = dataclasses.replace(config, warmup_steps=steps)
        return config.build(self.model, run_steps=run_steps(self.trainer))

    def setup(self, stage: str) -> None:
        """Compares the classes of the data with the model's, and weighs them."""
        data = self.trainer.datamodule
        names = getattr(data, "class_names", None)
        if names is not None:
            self._take_classes(names)
        if stage == "fit" and self.class_weights == "balanced":
            counts = torch.as_tensor(data.class_counts, dtype=torch.float32)
            weights = counts.sum() / (len(counts) * counts.clamp(min=1))
            self.loss_weights = weights.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        loss = self.training_loss(batch)
        self._losses.append(loss.detach())
        log_counts(self, "train", batch)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step, which may have accumulated several batches."""
        self.log("train_loss", torch.stack(self._losses).mean(), sync_dist=True)
        self._losses.clear()
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))
        self.log("grad_norm", total_grad_norm(self.model))

    def on_validation_epoch_start(self) -> None:
        """Begins new sums."""
        self.metrics.reset()

    def on_test_epoch_start(self) -> None:
        """Begins new sums."""
        self.metrics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch."""
        self._add("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch."""
        self._add("test", batch)

    def _add(self, split: str, batch: Any) -> None:
        count = None if counts_samples(self.trainer) else 0
        self.metrics.update(self.logits(batch)[:count], self.labels(batch)[:count])
        log_counts(self, split, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val_loss`, `val_accuracy`, `val_balanced_accuracy`, `val_auroc` and pictures."""
        self.log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test_loss`, `test_accuracy` and so on, and pictures."""
        self.log_held_out("test")

    def log_held_out(self, split: Split) -> None:
        """Logs the figures and pictures of an evaluation that has ended."""
        figures, counts = self.metrics.compute()
        if self.trainer.sanity_checking or not figures:
            return
        self.figures[split], self.confusions[split] = figures, counts
        for name, value in figures.items():
            self.log(f"{split}_{name}", value, sync_dist=True)
        if not self.trainer.is_global_zero:
            return
        # A fit ends with a report, if it has one.
        if self.trainer.state.fn != "fit" and not self.trainer.fast_dev_run:
            self._record(split)
        title = {"val": "Validation", "test": "Test"}[split]
        figure = confusion_figure(counts, self.shown_class_names, title=title)
        log_figure(self.trainer, f"{split}_confusion", figure)
        if not self._has_logged_pattern:
            self._has_logged_pattern = True
            log_figure(self.trainer, "pattern", pattern_figure(self.model.config))

    def predict_step(self, batch: Any, batch_idx: int) -> list[tuple[str, str, float]]:
        """Prints name, likeliest class and its probability of each sample, and returns them."""
        best = self.logits(batch).float().softmax(-1).max(-1)
        rows = [
            (name, self.shown_class_names[number], probability)
            for name, number, probability in zip(
                self.names(batch), best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]
        # Without a name it is none of the data; see `names`.
        rows = [row for row in rows if row[0]]
        for name, label, probability in rows:
            print(f"{name}\t{label}\t{probability:.3f}")
        return rows

    def progress_text(self, metrics: dict[str, float]) -> str:
        """Returns what a progress bar shows of the newest metrics."""
        names = {"train loss": "train_loss", "val loss": "val_loss"}
        parts = [f"{short} {metrics[name]:.3f}" for short, name in names.items() if name in metrics]
        if "val_accuracy" in metrics:
            parts.append(f"val accuracy {metrics['val_accuracy']:.1%}")
        rate = f"{self.unit}_per_second"
        if rate in metrics:
            parts.append(f"{metrics[rate]:,.1f} {self.unit}/s")
        return "  ".join(parts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the names of the classes, for `predict` on data without them."""
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another model, and to resume with another optimizer.

        Raises:
            ValueError: The model or the optimizer differs; the message says in what.
        """
        check_checkpoint(self, checkpoint)
        names = checkpoint.get("class_names")
        if names is not None:
            self._take_classes(names)

    def _take_classes(self, names: Sequence[str]) -> None:
        """Takes the names of the classes, from the data and from a checkpoint."""
        names = tuple(names)
        if len(names) != self.num_classes:
            raise ValueError(
                f"the model and the data must have the same classes, got num_classes="
                f"{self.num_classes} and data with {len(names)}: {', '.join(names[:20])}. "
                f"Pass --model.num_classes {len(names)}."
            )
        if self.class_names not in (None, names):
            raise ValueError(
                "the checkpoint and the data must have the same classes in the same order, got "
                f"{' '.join(names[:20])} and {' '.join(self.class_names[:20])}."
            )
        self.class_names = names

    def _check(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, got {self.num_classes}.")
        weights = self.class_weights
        if weights is not None and weights != "balanced" and len(weights) != self.num_classes:
            raise ValueError(
                f"class_weights needs a number for each class, got {list(weights)} and "
                f"num_classes={self.num_classes}."
            )
        if weights not in (None, "balanced") and not all(
            0 < weight < math.inf for weight in weights
        ):
            raise ValueError(f"class_weights must be finite and above 0, got {list(weights)}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")
        if self.warmup_epochs < 0 or (self.warmup_epochs and self.optimization.warmup_steps):
            raise ValueError(
                "warmup_epochs must be 0 or more, and 0 with optimization.warmup_steps, got "
                f"warmup_epochs={self.warmup_epochs} and "
                f"warmup_steps={self.optimization.warmup_steps}."
            )

    def _record(self, split: Split) -> None:
        """Writes what a split came to into the run folder."""
        entries = {
            "metrics": {f"{split}_{name}": value for name, value in self.figures[split].items()},
            f"{split}_classes": class_scores(self.confusions[split], self.shown_class_names),
            f"{split}_confusion": self.confusions[split].tolist(),
        }
        update_record(self.trainer.default_root_dir, **entries)
