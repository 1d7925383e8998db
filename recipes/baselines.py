"""What simple classifiers beside a run have in common: a logistic regression, and the report.

Shapes: m samples, k channels of their embeddings, c classes.
"""

import dataclasses

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .run_folder import update_record

__all__ = ["BaselineConfig", "LogisticRegression", "report"]

_COLUMNS = ("accuracy", "balanced_accuracy", "auroc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How the baselines are fitted.

    Attributes:
        max_samples: Training samples to fit them on at most; of slides evenly spaced.
        l2: Weight of the squared norm of a regression's weights, on standardised features.
    """

    max_samples: int = 4096
    l2: float = 1e-2

    def __post_init__(self) -> None:
        if self.max_samples < 1 or self.l2 <= 0:
            raise ValueError(
                "max_samples must be 1 or more and l2 positive, got "
                f"max_samples={self.max_samples} and l2={self.l2}."
            )


class LogisticRegression(nn.Module):
    """Multinomial logistic regression on standardised embeddings, fitted by L-BFGS.

    It minimises the mean cross-entropy plus `l2` times the sum of the squared weights; the
    intercept is free. In float64, and without randomness.

    Args:
        embeddings: Of the training samples, (m, k).
        labels: Their classes, (m,).
        num_classes: Number of classes.
        l2: The penalty.
        class_weights: Weight of each class in the cross-entropy, (c,); None weighs all alike.
    """

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        l2: float,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Fits inside an evaluation, where Lightning turns gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            x = embeddings.detach().double().clone()
            self.mean, self.std = x.mean(dim=0), x.std(dim=0, correction=0)
            # Channels that do not vary say nothing.
            self.std = torch.where(self.std > 1e-6, self.std, torch.inf)
            self.linear = nn.Linear(x.shape[1], num_classes, dtype=torch.float64)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
            self._fit((x - self.mean) / self.std, labels.clone(), l2, class_weights)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Returns the scores of the classes, (m, c), of embeddings (m, k)."""
        return self.linear((embeddings.double() - self.mean) / self.std).float()

    def _fit(self, x: Tensor, labels: Tensor, l2: float, class_weights: Tensor | None) -> None:
        weights = None if class_weights is None else class_weights.detach().cpu().double()
        optimizer = torch.optim.LBFGS(
            self.linear.parameters(), max_iter=500, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self.linear(x), labels, weight=weights)
            value = value + l2 * self.linear.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)


def report(
    trainer: L.Trainer, results: dict[str, dict[str, float]], *, split: str, num_classes: int
) -> None:
    """Prints a table, logs its figures and adds them to the run folder's `metrics.json`.

    Args:
        trainer: The trainer; only its first process reports.
        results: For each row its figures.
        split: What they were measured on.
        num_classes: Number of classes.
    """
    if not trainer.is_global_zero:
        return
    width = max(map(len, results))
    print(f"\n{split:{width}}  {'  '.join(_COLUMNS)}")
    for name, figures in results.items():
        cells = (f"{figures.get(column, float('nan')):{len(column)}.3f}" for column in _COLUMNS)
        print(f"{name:{width}}  {'  '.join(cells)}")
    print(f"{'chance':{width}}  {'':{len(_COLUMNS[0])}}  {1 / num_classes:{len(_COLUMNS[1])}.3f}\n")
    if trainer.fast_dev_run:
        return
    rows = {
        f"{split}_{column}/{name.replace(' ', '_')}": figures[column]
        for name, figures in results.items()
        for column in _COLUMNS
        if column in figures
    }
    for logger in trainer.loggers:
        logger.log_metrics(rows, step=trainer.global_step)
    update_record(trainer.default_root_dir, comparison={split: results})
