"""Events, with start and end, as tags of frames and back.

Shapes: b batch, k events, c classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .classification_metrics import UNLABELLED

__all__ = ["FoundEvent", "events_of", "frame_tags"]

# Class, start and end in seconds, and the greatest probability in between.
FoundEvent = tuple[int, float, float, float]

# Parts of a frame that do not count: seconds in float32 are exact to 0.001 after four hours.
_SLACK = 0.05


def frame_tags(
    events: Sequence[Tensor | None],
    num_real: Tensor,
    *,
    num_frames: int,
    frame_rate: float,
    num_classes: int,
) -> Tensor:
    """Tags every frame with what is heard in any part of it.

    Args:
        events: Start and end in seconds and class of the events of each sample, (k, 3); None where
            nobody knows.
        num_real: Frames of each sample, (b,); what follows is padding.
        num_frames: Frames of the longest.
        frame_rate: Frames a second.
        num_classes: Number of classes.

    Returns:
        1 where a class is heard, 0 where not, `UNLABELLED` where nobody knows; (b, frames, c)
        int64.
    """
    places = torch.arange(num_frames, device=num_real.device)
    tags = torch.zeros(
        len(events), num_frames, num_classes, dtype=torch.int64, device=num_real.device
    )
    for own, rows in zip(tags, events, strict=True):
        if rows is None:
            own.fill_(UNLABELLED)
            continue
        first = (rows[:, 0] * frame_rate + _SLACK).floor()
        last = (rows[:, 1] * frame_rate - _SLACK).floor()
        for start, end, number in zip(first, last, rows[:, 2].long().tolist(), strict=True):
            own[(places >= start) & (places <= torch.maximum(start, end)), number] = 1
    is_padding = places >= num_real[:, None]
    return tags.masked_fill(is_padding[..., None], UNLABELLED)


def events_of(
    probabilities: Tensor, *, frame_rate: float, threshold: float = 0.5
) -> list[FoundEvent]:
    """Joins frames in which a class is heard to events, in the order of their start.

    Args:
        probabilities: Of each class in each frame, (frames, c).
        frame_rate: Frames a second.
        threshold: Probability from which on a class is heard.
    """
    found: list[FoundEvent] = []
    is_heard = torch.nn.functional.pad((probabilities >= threshold).int(), (0, 0, 1, 1))
    steps = is_heard.diff(dim=0)
    for number in range(probabilities.shape[1]):
        starts = (steps[:, number] == 1).nonzero()[:, 0].tolist()
        ends = (steps[:, number] == -1).nonzero()[:, 0].tolist()
        for start, end in zip(starts, ends, strict=True):
            best = float(probabilities[start:end, number].max())
            found.append((number, start / frame_rate, end / frame_rate, best))
    return sorted(found, key=lambda event: (event[1], event[0]))
