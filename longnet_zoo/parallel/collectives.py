"""Collectives whose backward pass is their exact adjoint.

Every process computes the same loss from what all of them have, so the gradient of a parameter is
the mean over the processes of what each of them finds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_sum", "average_gradients", "group_named", "swap_rows"]


def group_named(name: str) -> dist.ProcessGroup:
    """Finds the process group of a name, which an operator can take where it takes no group."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums a tensor over the processes; the gradients are summed likewise."""
    return _AllSum.apply(x, group)


def swap_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends row i to process i of the group, and returns what they sent, (group size, ...)."""
    return _SwapRows.apply(x, group)


def average_gradients(parameter: Tensor, group: dist.ProcessGroup) -> None:
    """Lets every backward pass average the gradient of a parameter over the processes.

    Gradients that add up over several passes are averaged once each. Half types travel as float32.

    Args:
        parameter: A leaf that requires gradients.
        group: The processes.
    """

    def average(grad: Tensor) -> Tensor:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=group)
        return (total / group.size()).to(grad.dtype)

    parameter.register_hook(average)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Not in place, so that a compiler can trace it.
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.group_name))


class _SwapRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SwapRows.apply(grad, ctx.group), None
