"""What a trained slide classifier is compared with, on the same slides and by the same figures.

Each baseline is a frozen embedding of slides with a logistic regression on it: the mean of the
tiles, which knows no positions; the same encoder with random weights; and, where training began
with given weights, the encoder with these. A run that does not beat them has learned nothing from
its encoder's training.

Shapes: m slides, k channels of their embeddings, c classes.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from .baselines import BaselineConfig, LogisticRegression
from .classification_metrics import UNLABELLED, ClassificationMetrics

__all__ = ["compare", "mean_of_tiles"]

Embed = Callable[..., Tensor]


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
