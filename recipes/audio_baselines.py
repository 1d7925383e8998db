"""What a trained audio model is compared with, on the same recordings and by the same figures.

All of them see log-mel spectrograms and nothing else: of a whole recording mean and standard
deviation of each band, as nearest neighbour and in a logistic regression; of a soundscape one frame
at a time in a logistic regression, which hears no more than that moment. And what knows the
classes' numbers only.

Shapes: m recordings or frames, k features, c classes.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from .baselines import BaselineConfig, LogisticRegression
from .classification_metrics import UNLABELLED, ClassificationMetrics
from .tagging_metrics import TaggingMetrics

__all__ = ["compare_clips", "compare_frames", "frame_features"]

Features = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]


def compare_clips(
    trainer: L.Trainer,
    model: Any,
    *,
    train: Iterable[Any],
    held_out: Iterable[Any],
    num_classes: int,
    config: BaselineConfig,
) -> dict[str, dict[str, float]]:
    """Fits and evaluates classifiers of log-mel statistics, and takes the largest class.

    Args:
        trainer: Says on which device, and gathers what the processes have.
        model: The audio model, for its spectrogram.
        train: Batches to fit on.
        held_out: Batches to evaluate on.
        num_classes: Number of classes.
        config: The settings.

    Returns:
        For each baseline its figures.
    """

    def features(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        log_mel, is_real = _log_mel(model, batch)
        count = is_real.sum(1, keepdim=True)
        mean = (log_mel * is_real[..., None]).sum(1) / count
        spread = ((log_mel - mean[:, None]).square() * is_real[..., None]).sum(1) / count
        known = batch["labels"] != UNLABELLED
        return torch.cat([mean, spread.sqrt()], dim=-1)[known], batch["labels"][known]

    x, y = _gather(trainer, features, train, config.max_samples)
    held_x, held_y = _gather(trainer, features, held_out)
    regression = LogisticRegression(x, y, num_classes=num_classes, l2=config.l2)
    scale = x.std(0, correction=0).clamp(min=1e-6)
    nearest = torch.cdist(held_x / scale, x / scale).argmin(1)
    counts = torch.bincount(y, minlength=num_classes).float()
    with torch.no_grad():
        scores = {
            "nearest log-mel statistics": F.one_hot(y[nearest], num_classes).float(),
            "regression on them": regression(held_x),
            "largest class": counts.expand(len(held_y), -1),
        }
    results = {}
    for name, logits in scores.items():
        metrics = ClassificationMetrics(num_classes)
        metrics.update(logits, held_y)
        results[name] = metrics.compute()[0]
    return results


def compare_frames(
    trainer: L.Trainer,
    model: Any,
    tags: Callable[[dict[str, Any]], Tensor],
    *,
    train: Iterable[Any],
    held_out: Iterable[Any],
    num_classes: int,
    config: BaselineConfig,
) -> dict[str, dict[str, float]]:
    """Fits and evaluates a logistic regression on the log-mels of each frame alone.

    Args:
        trainer: As above.
        model: As above.
        tags: Returns the tags of a batch's frames, (b, frames, c).
        train: Batches to fit on.
        held_out: Batches to evaluate on.
        num_classes: Number of classes.
        config: The settings.

    Returns:
        For each baseline its figures.
    """

    def features(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        frames, target = frame_features(model, batch), tags(batch)
        known = target[..., 0] != UNLABELLED
        return frames[known], target[known]

    x, y = _gather(trainer, features, train, config.max_samples)
    held_x, held_y = _gather(trainer, features, held_out)
    regression = [_binary_scores(x, y[:, i], held_x, config.l2) for i in range(num_classes)]
    shares = y.float().mean(0).clamp(1e-6, 1 - 1e-6).logit()
    results = {}
    for name, logits in (
        ("regression on single frames", torch.stack(regression, dim=-1)),
        ("how often each sounds", shares.expand(len(held_y), -1)),
    ):
        metrics = TaggingMetrics(num_classes)
        metrics.update(logits[None], held_y[None])
        results[name] = metrics.compute()[0]
    return results


def frame_features(model: Any, batch: dict[str, Any]) -> Tensor:
    """Returns the mean log-mels of each frame of the model, (b, frames, mels)."""
    log_mel, _ = _log_mel(model, batch)
    frames = model.num_frames(batch["waveform"].shape[1])
    return F.adaptive_avg_pool1d(log_mel.transpose(1, 2), frames).transpose(1, 2)


def _binary_scores(x: Tensor, y: Tensor, held_x: Tensor, l2: float) -> Tensor:
    """Returns the log-odds of y = 1, (m,)."""
    with torch.no_grad():
        scores = LogisticRegression(x, y, num_classes=2, l2=l2)(held_x)
    return scores[:, 1] - scores[:, 0]


def _log_mel(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the spectrogram, (b, columns, mels), and which columns are real, (b, columns)."""
    waveform, lengths = batch["waveform"], batch["lengths"]
    log_mel = model.log_mel(waveform, lengths).float()
    ends = lengths * log_mel.shape[1] / waveform.shape[1]
    return log_mel, torch.arange(log_mel.shape[1], device=ends.device) < ends[:, None]


def _gather(
    trainer: L.Trainer, features: Features, batches: Iterable[Any], max_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns features (m, k) and targets of all processes, on the CPU.

    Each process stops after a batch that brings it to `max_samples`.
    """
    parts, count = [], 0
    with torch.no_grad():
        for batch in batches:
            if max_samples is not None and count >= max_samples:
                break
            count += len(batch["names"])
            batch = trainer.strategy.batch_to_device(batch)
            x, y = features(batch)
            parts.append((x.cpu(), y.cpu()))
    if trainer.world_size > 1:
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, parts)
        parts = list(itertools.chain.from_iterable(gathered))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
