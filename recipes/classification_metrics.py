"""What a classifier is judged by, over a whole evaluation and all processes."""

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix

from recipes.data_ranks import counts_samples

__all__ = ["UNLABELLED", "ClassificationMetrics", "class_scores", "confusion_scores", "log_counts"]

# The label of a sample that counts for nothing: one whose class is unknown or that was not read.
UNLABELLED = -100


class ClassificationMetrics(nn.Module):
    """Loss, confusion matrix and area under the ROC curve, summed over batches and processes.

    Args:
        num_classes: Number of classes, 2 or more.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.auroc = MulticlassAUROC(num_classes, average="none")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: Scores of the classes, (batch, classes).
            labels: Class of each sample, (batch,); `UNLABELLED` ones do not count.
        """
        is_labelled = labels != UNLABELLED
        logits, labels = logits[is_labelled].float(), labels[is_labelled]
        self.loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.confusion.update(logits, labels)
        self.auroc.update(logits.softmax(-1), labels)

    def compute(self) -> tuple[dict[str, float], Tensor]:
        """Returns the figures by name, and the confusion matrix (rows: true classes) on the CPU.

        `auroc` is the mean over the classes that both occur and are not the only one; it is left
        out where there is no such class, and all figures are where no sample has a label.
        """
        with warnings.catch_warnings():
            # About classes that do not occur, which count for nothing below, and processes
            # without a sample.
            warnings.simplefilter("ignore", UserWarning)
            # Summed over processes, so they all agree on whether to go on.
            counts = self.confusion.compute().cpu()
            if not counts.sum():
                return {}, counts
            areas = self.auroc.compute().cpu()
            figures = {"loss": float(self.loss.compute()), **confusion_scores(counts)}
        per_class = counts.sum(1)
        is_defined = (per_class > 0) & (per_class < per_class.sum())
        if is_defined.any():
            figures["auroc"] = float(areas[is_defined].mean())
        return figures, counts

    def reset(self) -> None:
        """Forgets all batches."""
        for metric in (self.loss, self.confusion, self.auroc):
            metric.reset()


def confusion_scores(counts: Tensor) -> dict[str, float]:
    """Returns `accuracy`, and `balanced_accuracy`: the mean recall of the classes that occur.

    Args:
        counts: Confusion matrix, (classes, classes), rows are the true classes; not all 0.
    """
    counts = counts.double()
    per_class, correct = counts.sum(1), counts.diagonal()
    occurs = per_class > 0
    return {
        "accuracy": float(correct.sum() / per_class.sum()),
        "balanced_accuracy": float((correct[occurs] / per_class[occurs]).mean()),
    }


def class_scores(counts: Tensor, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Returns samples, recall and precision of each class; None where there is none to count.

    Args:
        counts: Confusion matrix, rows are the true classes.
        names: Names of the classes.
    """
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    return {
        name: {
            "samples": int(true[i]),
            "recall": float(right[i] / true[i]) if true[i] else None,
            "precision": float(right[i] / predicted[i]) if predicted[i] else None,
        }
        for i, name in enumerate(names)
    }


def log_counts(task: L.LightningModule, split: str, batch: dict[str, Any]) -> None:
    """Logs how much of an epoch could not be read, as `val_skipped`, or was cut, `val_truncated`.

    Args:
        task: What logs it.
        split: "train", "val" or "test".
        batch: A batch; data of one's own may have nothing to skip.
    """
    for name in ("skipped", "truncated"):
        if f"num_{name}" in batch:
            task.log(
                f"{split}_{name}",
                batch[f"num_{name}"].float() * counts_samples(task.trainer),
                on_step=False,
                on_epoch=True,
                reduce_fx="sum",
                sync_dist=True,
                batch_size=1,
            )
