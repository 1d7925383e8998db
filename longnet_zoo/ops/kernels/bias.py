"""Additive logits of one kernel call, made for a few query rows at a time.

An n x n tensor never exists at length: a relative bias is a table over distances, and a hidden key
is one boolean.

Shape legend: b batch of the call, u heads of the call, t rows (queries and keys) of the call; keys
that come from elsewhere may be more or fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LogitBias"]


@dataclass(frozen=True, kw_only=True)
class LogitBias:
    """What is added to the logits of a call; the gradient tensors are views to add to.

    Attributes:
        row_step: Positions between neighbouring rows.
        key_offset: Position of the first key minus that of the first query.
        by_distance: Bias by key position minus query position, (u, 2m - 1), zero distance in
            the middle.
        by_distance_grad: Where its gradient is added, same shape.
        dense: Bias by row, (u, t, t).
        dense_grad: Where its gradient is added, (u, t, t), or (1, t, t) if the heads share it.
        is_hidden: Keys that no query sees, bool, (b, t, u).
    """

    row_step: int
    key_offset: int = 0
    by_distance: Tensor | None = None
    by_distance_grad: Tensor | None = None
    dense: Tensor | None = None
    dense_grad: Tensor | None = None
    is_hidden: Tensor | None = None

    def add_to(self, logits: Tensor, start: int) -> None:
        """Adds the bias in place to logits (b, u, rows, keys) of the rows from `start` on."""
        num_rows, num_keys = logits.shape[-2:]
        if self.by_distance is not None:
            indices = self._indices(start, num_rows, num_keys)
            logits += self.by_distance[:, indices].to(logits.dtype)
        if self.dense is not None:
            logits += self.dense[:, start : start + num_rows, :num_keys].to(logits.dtype)
        if self.is_hidden is not None:
            is_hidden = self.is_hidden[:, :num_keys].transpose(1, 2).unsqueeze(2)
            logits.masked_fill_(is_hidden, float("-inf"))

    def add_grad(self, logits_grad: Tensor, start: int) -> None:
        """Adds the gradient of logits (b, u, rows, keys) to the gradients of the bias."""
        num_rows, num_keys = logits_grad.shape[-2:]
        if self.by_distance_grad is not None:
            indices = self._indices(start, num_rows, num_keys).flatten()
            self.by_distance_grad.index_add_(1, indices, logits_grad.sum(0).flatten(1))
        if self.dense_grad is not None:
            grad = self.dense_grad[:, start : start + num_rows, :num_keys]
            grad += logits_grad.sum(0).sum_to_size(grad.shape)

    def _indices(self, start: int, num_rows: int, num_keys: int) -> Tensor:
        assert self.by_distance is not None
        device = self.by_distance.device
        queries = torch.arange(start, start + num_rows, device=device)
        keys = torch.arange(num_keys, device=device)
        zero = self.by_distance.shape[1] // 2 + self.key_offset
        return (keys - queries[:, None]) * self.row_step + zero
