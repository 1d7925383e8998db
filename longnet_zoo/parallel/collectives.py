"""Collectives whose backward pass is their exact adjoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduced", "all_sum", "group_named", "swap_rows"]


def group_named(name: str) -> dist.ProcessGroup:
    """Finds the process group of a name, which an operator can take where it takes no group."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_sum(x: Tensor, group_name: str) -> Tensor:
    """Sums a tensor over the processes; the gradients are summed likewise."""
    return _AllSum.apply(x, group_name)


def swap_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends row i to process i of the group, and returns what they sent, (group size, ...)."""
    return _SwapRows.apply(x, group)


def all_reduced(x: Tensor, group_name: str) -> Tensor:
    """Sums a tensor over the processes; without a gradient."""
    # Not in place, so that a compiler can trace it.
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group_name))


# Graphs keep groups by name: one that is kept beyond its end can abort the process at its exit.
class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return all_reduced(x, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduced(grad, ctx.group_name), None


class _SwapRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group_name = group.group_name
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SwapRows.apply(grad, group_named(ctx.group_name)), None
