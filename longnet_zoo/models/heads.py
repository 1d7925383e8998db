"""What the heads of several models share: the mean of real tokens, and heads made later.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["fit_module", "masked_mean"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def masked_mean(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Computes the mean of the tokens that are no padding, whatever padding holds.

    Args:
        x: Tokens, (batch, seq_len, embed_dim).
        padding_mask: Bool (batch, seq_len), True = padding.

    Returns:
        Means, (batch, embed_dim), in the dtype of `x`; 0 where all is padding.
    """
    if padding_mask is None:
        return x.mean(dim=1)
    # Half types could not hold the sum.
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.masked_fill(padding_mask[..., None], 0.0).sum(dim=1, dtype=dtype)
    return (total / (~padding_mask).sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)


def fit_module(module: ModuleT, model: nn.Module) -> ModuleT:
    """Gives a new module the device, dtype and mode (training or not) of its model."""
    return module.to(next(model.parameters())).train(model.training)
