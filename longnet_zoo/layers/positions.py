"""Positions as modules: rotary tables, ALiBi and T5's relative bias.

A bias module maps int64 distances (key position minus query position), (m,), to additive logits,
(num_heads, m); `dilated_attention` takes it as `bias`. None of these modules holds a buffer, so
`module.to(torch.bfloat16)` cannot spoil a table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longnet_zoo.ops.positions import alibi_slopes, relative_buckets, rotary_tables

__all__ = ["AlibiBias", "RelativeBias", "RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    """Makes the rotary tables that all layers of a model share.

    Args:
        head_dim: Channels per head, even.
        base: Ratio of the longest to the shortest wavelength.

    Raises:
        ValueError: If `head_dim` is odd or `base` is not above 1.

    Example:
        >>> cos, sin = RotaryEmbedding(head_dim=64)(torch.arange(8192))
    """

    def __init__(self, *, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        rotary_tables(torch.zeros(1), head_dim, base=base)  # Bad arguments fail here.

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Computes cosine and sine at absolute positions.

        Args:
            positions: Positions, (seq_len,).

        Returns:
            Two float32 tables, (seq_len, head_dim / 2), whatever the dtype of the module.
        """
        return rotary_tables(positions, self.head_dim, base=self.base)

    def extra_repr(self) -> str:
        """Lists the options."""
        return f"head_dim={self.head_dim}, base={self.base}"


class AlibiBias(nn.Module):
    """ALiBi (arXiv 2108.12409): adds -slope * |distance| to the logits of each head.

    Args:
        num_heads: Number of query heads.

    Raises:
        ValueError: If `num_heads` is below 1.
    """

    def __init__(self, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        alibi_slopes(num_heads)  # Bad arguments fail here.

    def forward(self, distances: Tensor) -> Tensor:
        """Computes the bias of each head: float32 (num_heads, m) for distances (m,)."""
        slopes = alibi_slopes(self.num_heads, device=distances.device)
        return -slopes[:, None] * distances.abs().to(torch.float32)

    def extra_repr(self) -> str:
        """Lists the options."""
        return f"num_heads={self.num_heads}"


class RelativeBias(nn.Module):
    """T5's relative bias (arXiv 1910.10683): one learned value per head and distance bucket.

    Args:
        num_heads: Number of query heads.
        num_buckets: Number of buckets, of both directions together.
        max_distance: Distance from which on all share the last bucket.
        bidirectional: Whether later keys have buckets of their own. Causal attention wants False:
            otherwise half of the buckets are never used.

    Raises:
        ValueError: If `num_heads`, `num_buckets` or `max_distance` is too small.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}.")
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self._buckets(torch.zeros(1, dtype=torch.int64))  # Bad arguments fail here.
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, distances: Tensor) -> Tensor:
        """Looks up the bias of each head: (num_heads, m) for distances (m,)."""
        return self.embedding(self._buckets(distances)).transpose(0, 1)

    def extra_repr(self) -> str:
        """Lists the options."""
        return f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"

    def _buckets(self, distances: Tensor) -> Tensor:
        return relative_buckets(
            distances,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
