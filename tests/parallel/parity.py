"""Compares what processes find together with the float64 oracle, each gradient by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from tests.ops.draws import Call, assert_close, cotangents, oracle_results, sum_loss

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


def assert_parts_equal_whole(
    call: Call,
    attend: Callable[..., tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    with_lse_grad: bool = False,
    tolerance: dict[str, float] = FLOAT32,
    extra: int = 0,
    **options: Any,
) -> None:
    """Attends to this process's part, and compares the sum over all processes with the oracle.

    Args:
        call: The call; its sequence is padded at the end to equal parts.
        attend: Attends to a part, by the signature of `dilated_attention`.
        dtype: Dtype of the inputs.
        with_lse_grad: Whether a gradient flows in through the LSE.
        tolerance: Largest difference.
        extra: Tokens of padding beyond what equal parts need.
        **options: Options of `attend`.
    """
    inputs = call.inputs(dtype)
    num_padding = extra + -(call.seq_len + extra) % dist.get_world_size()
    mask = call.key_padding_mask()
    if num_padding and mask is None and not call.documents:
        mask = torch.zeros(call.batch, call.seq_len, dtype=torch.bool, device=call.device)
    out, lse = attend(
        *(_part(inputs[name], num_padding) for name in "qkv"),
        call.pattern,
        bias=call.as_bias(inputs.get("bias")),
        return_lse=True,
        **call.options()
        | {"key_padding_mask": None if mask is None else _part(mask, num_padding, fill=True)},
        **options,
    )
    factors = tuple(_part(x, num_padding) for x in cotangents(call, dtype))
    loss = sum_loss(out, lse if with_lse_grad else None, factors)
    grads = torch.autograd.grad(loss, list(inputs.values()))
    found = {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    expected = oracle_results(call, inputs, with_lse_grad=with_lse_grad)
    for name, grad in found.items():
        total = grad.double()
        dist.all_reduce(total)
        assert_close(total, expected[name], name, tolerance)
    for name, value, fill in (("out", out, 0.0), ("lse", lse, float("-inf"))):
        assert value.dtype == (dtype if name == "out" else torch.promote_types(dtype, torch.float))
        whole = _part(expected[name], num_padding, fill=fill)
        assert_close(value.detach(), whole, name, tolerance)


def _part(x: Tensor, num_padding: int, *, fill: Any = 0) -> Tensor:
    """This process's part of dim 1 of a tensor, padded at its end."""
    padded = pad(x, (0, 0) * (x.ndim - 2) + (0, num_padding), value=fill)
    return padded.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
