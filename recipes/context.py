"""Measures what a long context is worth: bits per byte against position, and with less context.

Each held-out window is scored twice: as it is, and cut into pieces of `short_context` tokens that
cannot see each other. Both score the same tokens, so the difference is the context alone.

Shapes: b batch, n seq_len.
"""

import dataclasses
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["ContextCurve", "ContextFigures", "context_marks", "measure_context"]


@dataclasses.dataclass(kw_only=True)
class ContextCurve:
    """Summed loss and bytes at each position of the context.

    Attributes:
        nats: Summed loss, float64, (context,).
        num_bytes: Bytes of text scored, float64, (context,).
    """

    nats: Tensor
    num_bytes: Tensor

    def between(self, start: int = 0, stop: int | None = None) -> float:
        """Returns the bits per byte from `start` to before `stop`, NaN where there is no text."""
        num_bytes = float(self.num_bytes[start:stop].sum())
        if not num_bytes:
            return math.nan
        return float(self.nats[start:stop].sum()) / math.log(2) / num_bytes

    def steps(self, *, per_octave: int = 1, smallest: int = 32) -> list[tuple[int, int, float]]:
        """Returns (start, stop, bits per byte) of ranges that grow with the position."""
        size = len(self.nats)
        edges = [0, min(smallest, size)]
        while edges[-1] < size:
            grown = smallest * 2 ** ((len(edges) - 1) / per_octave)
            edges.append(min(size, max(edges[-1] + 1, round(grown))))
        return [(start, stop, self.between(start, stop)) for start, stop in pairwise(edges)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextFigures:
    """What `measure_context` found.

    Attributes:
        full: Scores with the whole context.
        short: Scores of the same tokens with the context cut.
        short_context: Tokens of the cut context.
        near: The first so many positions are "near" the start of the context.
        far: Positions from here on are "far".
        num_windows: Windows scored.
    """

    full: ContextCurve
    short: ContextCurve
    short_context: int
    near: int
    far: int
    num_windows: int

    @property
    def context(self) -> int:
        """Tokens of the whole context."""
        return len(self.full.nats)

    def to_dict(self) -> dict[str, float | None]:
        """Returns the figures by name, bits per byte unless the name says otherwise.

        None stands for positions without text, since JSON has no NaN.
        """
        bits = {
            f"context_{self.context}": self.full.between(),
            f"context_{self.short_context}": self.short.between(),
            f"first_{self.near}": self.full.between(0, self.near),
            f"beyond_{self.far}": self.full.between(self.far),
        }
        return {
            **{name: None if math.isnan(value) else value for name, value in bits.items()},
            "num_windows": self.num_windows,
            "num_bytes": int(self.full.num_bytes.sum()),
        }


@torch.no_grad()
def measure_context(
    task: Any,
    batches: Iterable[dict[str, Tensor]],
    *,
    seq_len: int,
    short_context: int | None = None,
    near: int | None = None,
    far: int | None = None,
    strategy: Any = None,
) -> ContextFigures:
    """Scores held-out windows with the whole context and with a short one.

    Args:
        task: A recipe's module, with `token_losses(tokens, labels, cu_seqlens=...)` in nats and
            `token_bytes`, the bytes of each token id.
        batches: Batches of the data module.
        seq_len: The whole context in tokens.
        short_context: Tokens of the short context; None takes a sixteenth of the whole.
        near: Positions at the start to average over; None takes a thirty-second of the whole.
        far: Position from which on to average; None takes a quarter of the whole.
        strategy: Lightning strategy whose processes share the batches, if any.

    Returns:
        The figures, the same on all processes.

    Raises:
        ValueError: A position lies outside the context.
    """
    marks = context_marks(seq_len, short_context=short_context, near=near, far=far)
    short = marks["short_context"]
    # Row 0 the loss with the whole context, row 1 with the short one, row 2 the bytes.
    sums = torch.zeros(3, seq_len, dtype=torch.float64)
    num_tokens = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        batch = {name: value.to(task.device) for name, value in batch.items()}
        position = _positions(batch)
        num_bytes = task.token_bytes[batch["labels"].clamp(min=0)] * (batch["labels"] >= 0)
        for row, values in zip(
            sums,
            (task.token_losses(**batch), _short_losses(task, batch, short), num_bytes),
            strict=True,
        ):
            row.index_add_(0, position.flatten(), values.flatten().cpu().double())
        num_tokens += position.numel()
    if strategy is not None and strategy.world_size > 1:
        device = strategy.root_device
        sums = strategy.reduce(sums.to(device), reduce_op="sum").cpu()
        num_tokens = strategy.reduce(num_tokens.to(device), reduce_op="sum").cpu()
    place = torch.arange(seq_len) % short
    short_nats, short_bytes = torch.zeros(2, short).double().index_add(1, place, sums[1:])
    return ContextFigures(
        full=ContextCurve(nats=sums[0], num_bytes=sums[2]),
        short=ContextCurve(nats=short_nats, num_bytes=short_bytes),
        num_windows=round(float(num_tokens) / seq_len),
        **marks,
    )


def _positions(batch: dict[str, Tensor]) -> Tensor:
    """Returns each token's place in its context, (b, n) or, for packed documents, (1, b * n)."""
    place = torch.arange(batch["tokens"].shape[1])
    if "cu_seqlens" not in batch:
        return place.expand(batch["tokens"].shape)
    starts = batch["cu_seqlens"].cpu().long()
    return (place - starts[torch.searchsorted(starts, place, right=True) - 1])[None]


def _short_losses(task: Any, batch: dict[str, Tensor], short: int) -> Tensor:
    """Returns the losses of the same tokens, each piece of `short` tokens by itself."""
    tokens, labels = batch["tokens"], batch["labels"]
    if "cu_seqlens" not in batch:
        pieces = zip(tokens.split(short, dim=1), labels.split(short, dim=1), strict=True)
        return torch.cat([task.token_losses(x, y) for x, y in pieces], dim=1)
    starts = torch.nonzero(_positions(batch)[0] % short == 0)[:, 0]
    cu_seqlens = torch.cat([starts, torch.tensor([tokens.shape[1]])])
    return task.token_losses(tokens, labels, cu_seqlens.to(batch["cu_seqlens"]))


def context_marks(
    size: int, *, short_context: int | None, near: int | None, far: int | None
) -> dict[str, int]:
    """Returns the positions to compare, checked against a context of `size` tokens.

    Raises:
        ValueError: A position lies outside the context.
    """
    marks = {
        "short_context": max(1, size // 16) if short_context is None else short_context,
        "near": max(1, size // 32) if near is None else near,
        "far": size // 4 if far is None else far,
    }
    for name, value in marks.items():
        if not 1 <= value < size:
            raise ValueError(
                f"{name} must be at least 1 and less than the context, got {name}={value} and "
                f"seq_len={size}."
            )
    return marks
