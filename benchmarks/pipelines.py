"""What dilated attention is compared with: the usual way to write it, and its bare kernel calls.

Both use the same fused kernel of PyTorch as the library does. They serve the shapes that are
benchmarked: causal, seq_len divisible by each segment, num_heads and segments by each rate.

Shape legend: b batch, n seq_len, h heads, d head_dim, g segments, m kept rows, r dilation_rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longnet_zoo.ops import DilatedPattern
from longnet_zoo.ops.kernels import sdpa
from longnet_zoo.ops.kernels.call import BlockOptions

__all__ = ["bare_kernel_calls", "usual_pipeline"]


class _KernelWithLse(torch.autograd.Function):
    """The fused kernel on (b, n, h, d), returning its LSE; the LSE is not differentiated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.options = BlockOptions(scale=q.shape[-1] ** -0.5, is_causal=True)
        out, lse = sdpa.forward(q, k, v, ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sdpa.backward(out_grad, *ctx.saved_tensors, ctx.options)


def usual_pipeline(q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern) -> Tensor:
    """Gathers every branch, attends it, scatters it to a dense tensor, stacks and mixes.

    As in the released implementations, the mixing weights are not differentiated.
    """
    outs, lses = [], []
    for segment_length, rate in pattern.branches:
        kept = [_gather(x, segment_length, rate) for x in (q, k, v)]
        out, lse = _KernelWithLse.apply(*kept)
        outs.append(_scatter(out, q.shape, segment_length, rate, fill=0.0))
        lses.append(_scatter(lse[..., None], (*q.shape[:3], 1), segment_length, rate, fill=-1e8))
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), dim=0)
    return (torch.stack(outs) * weights).sum(0)


def _gather(x: Tensor, segment_length: int, rate: int) -> Tensor:
    x = rearrange(x, "b (g w) h d -> (b g) w h d", w=segment_length)
    x = rearrange(x, "g (m r1) (a r2) d -> g m r1 a r2 d", r1=rate, r2=rate)
    x = torch.diagonal(x, dim1=2, dim2=4)
    return rearrange(x, "g m a d r -> g m (a r) d").contiguous()


def _scatter(
    x: Tensor, shape: tuple[int, ...], segment_length: int, rate: int, *, fill: float
) -> Tensor:
    batch, seq_len, _, head_dim = shape
    num_segments = batch * seq_len // segment_length
    dense = x.new_full((num_segments, segment_length // rate, rate, x.shape[2], head_dim), fill)
    dense = rearrange(dense, "g m r1 (a r2) d -> g m r1 a r2 d", r2=rate)
    diagonal = torch.diagonal(dense, dim1=2, dim2=4)
    diagonal.copy_(rearrange(x, "g m (a r) d -> g m a d r", r=rate))
    return rearrange(dense, "(b g) m r1 a r2 d -> b (g m r1) (a r2) d", b=batch)


def bare_kernel_calls(
    q: Tensor, pattern: DilatedPattern
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that run the kernel forward and backward on contiguous blocks of the same sizes.

    Nothing is selected and nothing merged: the least that a schedule of these blocks can take.
    """
    batch, seq_len, num_heads, head_dim = q.shape
    blocks = []
    for segment_length, rate in pattern.branches:
        shape = (batch * seq_len // segment_length, num_heads, segment_length // rate, head_dim)
        tensors = [torch.randn(shape, dtype=q.dtype, device=q.device) for _ in range(5)]
        lse = torch.full(shape[:3], 10.0, device=q.device)
        blocks.append([x.transpose(1, 2) for x in (*tensors, lse)])
    options = BlockOptions(scale=head_dim**-0.5, is_causal=True)

    def forward() -> None:
        for out_grad, q_rows, k_rows, v_rows, *_ in blocks:
            del out_grad
            sdpa.forward(q_rows, k_rows, v_rows, options)

    def backward() -> None:
        for block in blocks:
            sdpa.backward(*block, options)

    return forward, backward
