"""The online softmax: partial attention results joined through their log-sum-exp (LSE).

Two partial results over disjoint (multi)sets of keys, each normalised by its own softmax, join as

    lse = log(exp(lse_a) + exp(lse_b))
    out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

An LSE of -inf stands for "no key"; zero is an ordinary value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["add_zero_keys_", "merge_"]


def merge_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Joins a partial result into another one in place.

    Args:
        out: Result so far, (..., head_dim), float32 or float64; any strides.
        lse: Its natural-log LSE, (...), same dtype; -inf where nothing was attended yet.
        new_out: Partial result to add, (..., head_dim), any floating dtype.
        new_lse: Its LSE, (...), dtype of `lse`.
    """
    # The share of the new part is exp(new_lse - joint) = sigmoid(new_lse - lse). Where both parts
    # are empty the difference is NaN, and the share zero.
    share = torch.sigmoid(new_lse - lse).nan_to_num_(nan=0.0)
    out.lerp_(new_out.to(out.dtype), share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, new_lse))


def add_zero_keys_(out: Tensor, lse: Tensor, num_zero_keys: int) -> None:
    """Joins `num_zero_keys` keys with logit 0 and value 0 into a partial result in place."""
    joint = torch.logaddexp(lse, lse.new_full((), math.log(num_zero_keys)))
    out.mul_(torch.exp(lse - joint).unsqueeze(-1))
    lse.copy_(joint)
