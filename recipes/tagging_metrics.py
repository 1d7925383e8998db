"""What a tagger is judged by, frame by frame, over a whole evaluation and all processes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from .classification_metrics import UNLABELLED

__all__ = ["TaggingMetrics", "tag_scores"]

# Frames are counted by probability, so that hours of them need no memory. Even, for one half.
_NUM_BINS = 1000


class TaggingMetrics(Metric):
    """Loss, F1 and average precision of each class, summed over frames, batches and processes.

    Args:
        num_classes: Number of classes.
    """

    full_state_update = False
    loss_sum: Tensor
    num_tags: Tensor
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("num_tags", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # Frames by class, whether it is heard, and the probability that it is.
        counts = torch.zeros(num_classes, 2, _NUM_BINS, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, logits: Tensor, tags: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: Log-odds of each class, (batch, frames, classes).
            tags: 1 where it is heard, 0 where not, `UNLABELLED` for frames that do not count.
        """
        known = tags[..., 0] != UNLABELLED
        logits, tags = logits[known].float(), tags[known]
        self.loss_sum += F.binary_cross_entropy_with_logits(logits, tags.float(), reduction="sum")
        self.num_tags += tags.numel()
        bins = (logits.sigmoid() * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
        classes = torch.arange(tags.shape[-1], device=tags.device)
        places = ((classes * 2 + tags) * _NUM_BINS + bins).flatten()
        self.counts.view(-1).scatter_add_(0, places, torch.ones_like(places))

    def compute(self) -> tuple[dict[str, float], Tensor]:
        """Returns the figures by name, and the scores of each class on the CPU.

        `f1` (at a probability of one half) and `map` (mean average precision) are means over the
        classes that occur; there are no figures where no frame has tags. The scores, (classes, 4),
        are frames heard and named, named only, heard only, and the average precision.
        """
        counts = self.counts.cpu().double()
        false, right = counts[:, :, _NUM_BINS // 2 :].sum(-1).unbind(1)
        heard = counts[:, 1].sum(-1)
        # From the highest probability down.
        hits = counts[:, 1].flip(-1)
        precision = hits.cumsum(-1) / counts.sum(1).flip(-1).cumsum(-1).clamp(min=1)
        average = (precision * hits).sum(-1) / heard.clamp(min=1)
        scores = torch.stack([right, false, heard - right, average], dim=-1)
        if not self.num_tags:
            return {}, scores
        figures = {"loss": float(self.loss_sum / self.num_tags)}
        occurs = heard > 0
        if occurs.any():
            f1 = 2 * right / (right + false + heard).clamp(min=1)
            figures["f1"] = float(f1[occurs].mean())
            figures["map"] = float(average[occurs].mean())
        return figures, scores


def tag_scores(scores: Tensor, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Returns frames, F1 and average precision of each class; None where it does not occur.

    Args:
        scores: As `TaggingMetrics.compute` returns them.
        names: Names of the classes.
    """
    rows: dict[str, dict[str, float | None]] = {}
    for name, (right, false, missed, average) in zip(names, scores.tolist(), strict=True):
        heard = right + missed
        f1 = 2 * right / (2 * right + false + missed) if heard else None
        rows[name] = {"frames": heard, "f1": f1, "ap": average if heard else None}
    return rows
