"""Short contexts first: early steps read the beginning of their windows only, or rows of it.

A model learns spelling before it can use a long context, and for that many short steps teach more
than few long ones (Li, Zhang and He, arXiv 2108.06084). The context grows geometrically: each
doubling gets the same number of steps, or with a power above 1 fewer than the doubling before. It
depends on the optimizer step alone, so a resumed run continues exactly.

Shapes: b batch, n seq_len.
"""

import dataclasses
import math

import torch
from torch import Tensor

__all__ = ["ContextWarmup"]

# Contexts are rounded up to this, so that few different shapes occur.
_MULTIPLE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextWarmup:
    """How the context of training batches grows.

    Attributes:
        start: Context of the first step, in tokens.
        steps: Optimizer steps after which batches keep their whole context.
        step_tokens: Tokens that every step reads of its batch, also behind the warm-up: so many
            rows of the context as hold them (at least one, at most all), from as many windows as
            possible. None reads one row of each window, and early steps are short.
        power: The context is start * (seq_len / start) ** (share of `steps` that is done ** power).
            1 grows evenly; 3 spends 0.69 of the steps on the first third of the doublings.
    """

    start: int
    steps: int
    step_tokens: int | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "steps", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {name}={value}.")
        if not self.power > 0:
            raise ValueError(f"power must be above 0, got {self.power}.")

    def context(self, step: int, seq_len: int) -> int:
        """Returns the context of an optimizer step, counted from 0, in tokens."""
        if step >= self.steps or self.start >= seq_len:
            return seq_len
        grown = self.start * (seq_len / self.start) ** ((step / self.steps) ** self.power)
        return min(seq_len, math.ceil(grown / _MULTIPLE) * _MULTIPLE)

    def cut(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Returns rows of `tokens` and `labels` (b, n) for a step, (rows, context), copied.

        One is the beginning of a window; with `step_tokens` others are what follows it.

        Raises:
            ValueError: The rows are packed documents, whose beginning is one document's.
        """
        if "cu_seqlens" in batch:
            raise ValueError(
                "context_warmup cuts rows, and confine_to_document=True packs them into one. "
                "Use one of the two."
            )
        num_windows, seq_len = batch["tokens"].shape
        context = self.context(step, seq_len)
        num_rows = math.ceil((self.step_tokens or num_windows * context) / context)
        return {
            name: torch.cat(x[:, : seq_len // context * context].split(context, dim=1))[:num_rows]
            for name, x in batch.items()
        }
