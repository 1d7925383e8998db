"""Attention of tiles in which some pairs of rows are hidden.

On a CPU PyTorch's flash attention takes the hidden pairs as a mask; elsewhere, and for a gradient
through the LSE, it is done in plain matrix products.

Shape legend: c tiles of a call, t query rows, s key rows, d head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TiledRows", "attend_masked", "differentiate_masked", "picked"]

_aten = torch.ops.aten


class TiledRows(NamedTuple):
    """What a backward pass reads: rows (m, ...) as they lie, or in tiles (c, t, ...).

    k and v are rows of keys, the others of queries; out and lse are those of the whole softmax.
    """

    out_grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    lse_grad: Tensor | None

    def of_call(self, queries: Tensor, keys: Tensor) -> TiledRows:
        """Picks query tiles (c,) and the key tiles of each, (c, k), joined."""
        return TiledRows(
            out_grad=picked(self.out_grad, queries),
            q=picked(self.q, queries),
            k=picked(self.k, keys),
            v=picked(self.v, keys),
            out=picked(self.out, queries),
            lse=picked(self.lse, queries),
            lse_grad=None if self.lse_grad is None else picked(self.lse_grad, queries),
        )


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Tiles (tiles, t, ...) at an index (c,) or (c, k), the k of a call joined: (c, k * t, ...)."""
    # Twice as fast as x[index], which copies element by element.
    return x.index_select(0, index.flatten()).view(len(index), -1, *x.shape[2:])


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, *, limits: Tensor, places: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attends tiles.

    Args:
        q: Queries, (c, t, d).
        k: Keys, (c, s, d).
        v: Values, like k.
        limits: The last place that each query sees, (c, t).
        places: The place of each key, (c, s).
        scale: Factor on the dot products.

    Returns:
        out (c, t, d), and lse (c, t), at least float32; 0 and -inf where all keys are hidden.
    """
    if q.device.type == "cpu":
        views = (x.unsqueeze(1) for x in (q, k, v))
        mask = _hidden(limits, places, q.dtype).unsqueeze(1)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *views, 0.0, False, attn_mask=mask, scale=scale
        )
        # What the kernel says of a row without keys differs from version to version.
        is_empty = places.amin(1, keepdim=True) > limits
        out = out.squeeze(1).masked_fill_(is_empty.unsqueeze(-1), 0.0)
        return out, lse.squeeze(1).masked_fill_(is_empty, float("-inf"))
    return _attend_in_products(q, k, v, limits, places, scale)


def differentiate_masked(
    rows: TiledRows, *, limits: Tensor, places: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the gradients of q, k and v; a row whose LSE is +inf has none.

    Args:
        rows: Tiles of queries (c, t, ...) and keys (c, s, ...).
        limits: As for `attend_masked`.
        places: As for `attend_masked`.
        scale: Factor on the dot products.
    """
    dtype = rows.lse.dtype
    if rows.lse.device.type == "cpu" and rows.lse_grad is None:
        views = (x.unsqueeze(1) for x in rows[:6] if x is not None)
        mask = _hidden(limits, places, rows.q.dtype).unsqueeze(1)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *views, 0.0, False, attn_mask=mask, scale=scale
        )
        q_grad, k_grad, v_grad = (grad.squeeze(1) for grad in grads)
        return q_grad, k_grad, v_grad
    out_grad, q, k, v, out = (x.to(dtype) for x in rows[:5])
    weights = _logits(q, k, limits, places, scale).sub_(rows.lse.unsqueeze(-1)).exp_()
    delta = (out_grad * out).sum(-1)
    if rows.lse_grad is not None:
        delta = delta - rows.lse_grad
    logits_grad = (out_grad @ v.mT).sub_(delta.unsqueeze(-1)).mul_(weights).mul_(scale)
    return logits_grad @ k, logits_grad.mT @ q, weights.mT @ out_grad


def _attend_in_products(
    q: Tensor, k: Tensor, v: Tensor, limits: Tensor, places: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    logits = _logits(q, k, limits, places, scale)
    top = logits.amax(-1, keepdim=True)
    top.masked_fill_(top == float("-inf"), 0.0)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)  # at least 1, that of the largest logit, if there is one
    out = (weights @ v.to(weights.dtype)).div_(total.clamp_min(1.0))
    return out, (total.log() + top).squeeze(-1)


def _hidden(limits: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key, -inf elsewhere: (c, t, s)."""
    mask = torch.zeros((*limits.shape, places.shape[1]), dtype=dtype, device=limits.device)
    return mask.masked_fill_(places.unsqueeze(1) > limits.unsqueeze(2), float("-inf"))


def _logits(q: Tensor, k: Tensor, limits: Tensor, places: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) * scale) @ k.to(dtype).mT
    return logits.add_(_hidden(limits, places, dtype))
