"""Bits per byte, summed over every token and not averaged over batches of different size."""

import dataclasses
import math
from typing import Any

import torch

__all__ = ["BitsPerByte"]


@dataclasses.dataclass(kw_only=True)
class BitsPerByte:
    """Sums loss, tokens and bytes over an evaluation, and over processes at its end.

    Attributes:
        nats: Summed loss.
        num_tokens: Tokens with a loss.
        num_bytes: Bytes of text that those tokens stand for.
    """

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def update(self, *, nats: float, num_tokens: int, num_bytes: int) -> None:
        """Adds a batch."""
        self.nats += nats
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes

    def reduce(self, strategy: Any) -> None:
        """Adds up the sums of all processes of a Lightning strategy."""
        sums = torch.tensor([self.nats, self.num_tokens, self.num_bytes], dtype=torch.float64)
        # One process needs no device, and not every device has float64.
        if getattr(strategy, "world_size", 1) > 1:
            sums = strategy.reduce(sums.to(strategy.root_device), reduce_op="sum")
        self.nats, self.num_tokens, self.num_bytes = (
            float(sums[0]),
            int(sums[1]),
            int(sums[2]),
        )

    @property
    def loss(self) -> float:
        """Mean loss of a token in nats."""
        return self.nats / max(1, self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits spent on each byte of text."""
        return self.nats / math.log(2) / max(1, self.num_bytes)
