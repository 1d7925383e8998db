"""Rows of a batch whose padding may be anywhere, moved to where our models want it: behind.

Positions and segments start at the first real token, so a left-padded row must move before the
model reads it, and what the model returns must move back.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowOrder", "order_rows"]


class RowOrder:
    """Moves the real tokens of each row to the front, in their order, and back.

    Args:
        attention_mask: Real tokens, (batch, seq_len): bool, or 1 = real and 0 = padding.

    Attributes:
        key_padding_mask: Padding of moved rows, bool (batch, seq_len), True = padding.
    """

    def __init__(self, attention_mask: Tensor) -> None:
        is_padding = attention_mask == 0
        self._front = is_padding.to(torch.uint8).argsort(dim=1, stable=True)
        self._back = self._front.argsort(dim=1)
        self.key_padding_mask = is_padding.gather(1, self._front)

    def to_front(self, x: Tensor) -> Tensor:
        """Moves real tokens to the front: (batch, seq_len) or (batch, seq_len, embed_dim)."""
        return _take(x, self._front)

    def to_places(self, x: Tensor) -> Tensor:
        """Moves tokens back to their places: the inverse of `to_front`."""
        return _take(x, self._back)


def order_rows(
    attention_mask: Tensor | None, batch: int, seq_len: int, num_read: int = 0
) -> RowOrder | None:
    """Finds how rows must move.

    Args:
        attention_mask: Real tokens as for `RowOrder`, or None; it may begin with those that a cache
            has read.
        batch: Number of rows.
        seq_len: Tokens to read, of each row.
        num_read: Columns that a cache has read.

    Returns:
        Their order, or None where there is no padding.

    Raises:
        ValueError: If the mask has another shape.
    """
    if attention_mask is None:
        return None
    shapes = ((batch, seq_len), (batch, num_read + seq_len))
    if tuple(attention_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask must be (batch, seq_len) = {shapes[0]}, or {shapes[1]} with the "
            f"{num_read} columns that a cache has read, got {tuple(attention_mask.shape)}."
        )
    mask = attention_mask[:, -seq_len:]
    return None if bool((mask != 0).all()) else RowOrder(mask)


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.take_along_dim(order if x.ndim == 2 else order[..., None], dim=1)
