"""Independent work side by side: one CUDA stream each on a GPU, one after the other elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

__all__ = ["run_side_by_side"]

OutT = TypeVar("OutT")


def run_side_by_side(
    works: Sequence[Callable[[], OutT]], *, inputs: Iterable[Tensor], device: torch.device
) -> list[OutT]:
    """Runs functions that do not depend on each other, and returns what they return.

    On a GPU the first one runs in the current stream and each other one in a stream of its own.
    These wait for what the current stream has done, and it waits for them, so the caller sees no
    difference. The backward pass of each runs in its stream, too: autograd sees to that.

    Args:
        works: The functions.
        inputs: Tensors that they read and that may be freed before they are through.
        device: Where they run.
    """
    read = list(inputs)
    is_traced = torch.compiler.is_compiling() or any(isinstance(x, FakeTensor) for x in read)
    if len(works) < 2 or device.type != "cuda" or is_traced:
        return [work() for work in works]
    current = torch.cuda.current_stream(device)
    streams = [_side_stream(device, number) for number in range(1, len(works))]
    for stream in streams:
        stream.wait_stream(current)
    outs: list[OutT] = []
    for work, stream in zip(works, [current, *streams], strict=True):
        if stream is current:
            outs.append(work())
            continue
        with torch.cuda.stream(stream):
            outs.append(work())
        # Memory is handed on within its stream, unless it is known to be in use in another.
        for x in read:
            x.record_stream(stream)
    for out, stream in zip(outs[1:], streams, strict=True):
        current.wait_stream(stream)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)
    return outs


@cache
def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The stream of this number: always the same, since each keeps memory of its own."""
    return torch.cuda.Stream(device)
