"""Short contexts first: early steps read the beginning of their windows only.

A model learns spelling before it can use a long context, and for that many short steps teach more
than few long ones (Li, Zhang and He, arXiv 2108.06084). The context grows geometrically, so each
doubling gets the same number of steps. It depends on the optimizer step alone, so a resumed run
continues exactly.

Shapes: b batch, n seq_len.
"""

import dataclasses
import math

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
    """

    start: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {name}={getattr(self, name)}.")

    def context(self, step: int, seq_len: int) -> int:
        """Returns the context of an optimizer step, counted from 0, in tokens."""
        if step >= self.steps or self.start >= seq_len:
            return seq_len
        grown = self.start * (seq_len / self.start) ** (step / self.steps)
        return min(seq_len, math.ceil(grown / _MULTIPLE) * _MULTIPLE)

    def cut(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Returns the beginning of each row of `tokens` and `labels` (b, n), copied.

        Raises:
            ValueError: The rows are packed documents, whose beginning is one document's.
        """
        if "cu_seqlens" in batch:
            raise ValueError(
                "context_warmup cuts rows, and confine_to_document=True packs them into one. "
                "Use one of the two."
            )
        context = self.context(step, batch["tokens"].shape[1])
        return {name: rows[:, :context].contiguous() for name, rows in batch.items()}
