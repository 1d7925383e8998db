"""Counts the bytes that this process sends to others, by the calls that it makes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Traffic", "counting"]

# PyTorch's functions by kind; since 2.14 some have another name.
_FUNCTIONS = {
    "all_to_all_single": "all_to_all",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "all_reduce": "all_reduce",
}
_FUNCTIONALS = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")


class Traffic:
    """Bytes of floating-point numbers that left this process; lengths and masks are not counted.

    Attributes:
        sent: Bytes by kind of call.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def add(self, kind: str, x: Tensor, size: int, own: float | None = None) -> None:
        """Counts what a call of a group of `size` sends of `x`, of which `own` stays here."""
        others = 1 - (1 / size if own is None else own)
        share = {"all_gather": size - 1, "all_reduce": 2 * others, "message": 1}.get(kind, others)
        if x.is_floating_point():
            self.sent[kind] += round(x.numel() * x.element_size() * share)


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts while it is open: collectives, messages, and functional collectives."""
    traffic = Traffic()
    with ExitStack() as stack:

        def patch(module: Any, name: str, count: Callable[..., None]) -> None:
            call = getattr(module, name)

            def run(*args: Any, **kwargs: Any) -> Any:
                count(call, *args, **kwargs)
                return call(*args, **kwargs)

            stack.enter_context(mock.patch.object(module, name, run))

        for name, kind in _FUNCTIONS.items():
            if hasattr(dist, name):
                patch(dist, name, _collective(traffic, kind))
        patch(dist, "batch_isend_irecv", _messages(traffic))
        for name in _FUNCTIONALS:
            patch(torch.ops._c10d_functional, name, _functional(traffic, _FUNCTIONS[name]))
        yield traffic


def _collective(traffic: Traffic, kind: str) -> Callable[..., None]:
    def count(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(call).bind(*args, **kwargs).arguments
        x = next(given[name] for name in ("input", "input_tensor", "tensor") if name in given)
        rank, size = dist.get_rank(given.get("group")), dist.get_world_size(given.get("group"))
        counts = given.get("input_split_sizes")
        traffic.add(kind, x, size, counts[rank] / max(1, sum(counts)) if counts else None)

    return count


def _messages(traffic: Traffic) -> Callable[..., None]:
    def count(_: Any, operations: list[dist.P2POp]) -> None:
        for operation in operations:
            if operation.op is dist.isend:
                traffic.add("message", operation.tensor, 1)

    return count


def _functional(traffic: Traffic, kind: str) -> Callable[..., None]:
    def count(_: Any, x: Tensor, *args: Any) -> None:
        traffic.add(kind, x, dist.distributed_c10d._resolve_process_group(args[-1]).size())

    return count
