"""What a trained slide classifier is compared with, on the same slides and by the same figures.

Each baseline is a frozen embedding of slides with a logistic regression on it: the mean of the
tiles, which knows no positions; the same encoder with random weights; and, where training began
with given weights, the encoder with these. A run that does not beat them has learned nothing from
its encoder's training.

Shapes: m slides, k channels of their embeddings, c classes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classification_metrics import UNLABELLED, ClassificationMetrics
from .run_folder import update_record

__all__ = ["BaselineConfig", "LogisticRegression", "compare", "mean_of_tiles", "report"]

Embed = Callable[..., Tensor]

_COLUMNS = ("accuracy", "balanced_accuracy", "auroc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """How the baselines are fitted.

    Attributes:
        max_slides: Training slides to embed for them at most, evenly spaced.
        l2: Weight of the squared norm of the regression's weights, on standardised embeddings.
    """

    max_slides: int = 4096
    l2: float = 1e-3

    def __post_init__(self) -> None:
        if self.max_slides < 1 or self.l2 <= 0:
            raise ValueError(
                "max_slides must be 1 or more and l2 positive, got "
                f"max_slides={self.max_slides} and l2={self.l2}."
            )


class LogisticRegression(nn.Module):
    """Multinomial logistic regression on standardised embeddings, fitted by L-BFGS.

    It minimises the mean cross-entropy plus `l2` times the sum of the squared weights; the
    intercept is free. In float64, and without randomness.

    Args:
        embeddings: Of the training slides, (m, k).
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


def mean_of_tiles(tiles: Tensor, coords: Tensor, padding_mask: Tensor) -> Tensor:
    """Returns the mean of the tiles of each slide; arguments as for `SlideNetwork.embed`."""
    is_tile = ~padding_mask[..., None]
    return torch.where(is_tile, tiles, 0).sum(dim=1) / is_tile.sum(dim=1)


def compare(
    trainer: L.Trainer,
    embedders: dict[str, Embed],
    *,
    train: Iterable[Any],
    held_out: Iterable[Any],
    num_classes: int,
    config: BaselineConfig,
    class_weights: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Fits and evaluates a logistic regression on each of some embeddings.

    Args:
        trainer: Says on which device to embed, and gathers what the processes embedded.
        embedders: For each baseline, what makes embeddings of a batch's tiles, coordinates and
            padding mask.
        train: Batches to fit on.
        held_out: Batches to evaluate on.
        num_classes: Number of classes.
        config: The settings.
        class_weights: As for `LogisticRegression`.

    Returns:
        For each baseline its figures.
    """
    x, y = _embed(trainer, embedders, train)
    held_x, held_y = _embed(trainer, embedders, held_out)
    results = {}
    for name in embedders:
        head = LogisticRegression(
            x[name], y, num_classes=num_classes, l2=config.l2, class_weights=class_weights
        )
        metrics = ClassificationMetrics(num_classes)
        with torch.no_grad():
            metrics.update(head(held_x[name]), held_y)
        results[name] = metrics.compute()[0]
    return results


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


def _embed(
    trainer: L.Trainer, embedders: dict[str, Embed], batches: Iterable[Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the embeddings (m, k) of each name, and the labels (m,), of all processes."""
    device = trainer.strategy.root_device
    parts: dict[str, list[Tensor]] = {name: [] for name in embedders}
    labels: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            inputs = [batch[key].to(device) for key in ("tiles", "coords", "padding_mask")]
            for name, embed in embedders.items():
                parts[name].append(embed(*inputs).float().cpu())
            labels.append(batch["labels"])
    if trainer.world_size > 1:
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, (parts, labels))
        parts = {
            name: list(itertools.chain.from_iterable(own[name] for own, _ in gathered))
            for name in embedders
        }
        labels = list(itertools.chain.from_iterable(own for _, own in gathered))
    y = torch.cat(labels)
    known = y != UNLABELLED
    return {name: torch.cat(x)[known] for name, x in parts.items()}, y[known]
