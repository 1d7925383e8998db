"""What dilated attention is compared with: the usual way to write it, and its bare kernel calls.

Both use the same fused kernel of PyTorch as the library does.

Shape legend: b batch, n seq_len, h heads, d head_dim, g segments, m kept rows, r dilation_rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from longnet_zoo.ops import DilatedPattern
from longnet_zoo.ops.kernels import sdpa
from longnet_zoo.ops.kernels.call import BlockOptions

__all__ = ["bare_kernel_calls", "released_pipeline", "usual_pipeline"]


class _KernelWithLse(torch.autograd.Function):
    """The fused kernel on (b, n, h, d), returning its LSE; the LSE is not differentiated."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.options = BlockOptions(scale=q.shape[-1] ** -0.5, is_causal=is_causal)
        out, lse = sdpa.forward(q, k, v, ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *sdpa.backward(out_grad, *ctx.saved_tensors, ctx.options), None


def usual_pipeline(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, *, is_causal: bool = True
) -> Tensor:
    """Gathers every branch, attends it, scatters it to a dense tensor, stacks and mixes.

    As in the released implementations, segments and heads that do not fill a step are padded with
    zeros, which take softmax mass without a causal mask, and the mixing weights are not
    differentiated.
    """
    _check_padding(pattern, is_causal)
    seq_len, is_block = q.shape[1], pattern.head_offset == "block"
    outs, lses = [], []
    for segment_length, rate in pattern.branches:
        branch = (min(segment_length, seq_len), rate, is_block)
        kept = [_gather(x, *branch) for x in (q, k, v)]
        out, lse = _KernelWithLse.apply(*kept, is_causal)
        outs.append(_scatter(out, q.shape, *branch, fill=0.0))
        lses.append(_scatter(lse[..., None], (*q.shape[:3], 1), *branch, fill=-1e8))
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), dim=0).to(q.dtype)
    return (torch.stack(outs) * weights).sum(0)


def _check_padding(pattern: DilatedPattern, is_causal: bool) -> None:
    if not is_causal and pattern.padded_keys != "zero":
        raise ValueError(
            "the pipelines attend to padding, so without a causal mask the pattern must have "
            f"padded_keys='zero', got {pattern.padded_keys!r}."
        )


def _gather(x: Tensor, segment_length: int, rate: int, is_block: bool) -> Tensor:
    heads = "(r a)" if is_block else "(a r)"
    x = _pad(x, rows=-x.shape[1] % segment_length)
    x = rearrange(x, "b (g w) h d -> (b g) w h d", w=segment_length)
    x = _pad(x, rows=-segment_length % rate, heads=-x.shape[2] % rate)
    x = rearrange(x, f"g (m r1) {heads} d -> g m r1 a r d", r1=rate, r=rate)
    x = torch.diagonal(x, dim1=2, dim2=4)
    return rearrange(x, f"g m a d r -> g m {heads} d").contiguous()


def _scatter(
    x: Tensor,
    shape: tuple[int, ...],
    segment_length: int,
    rate: int,
    is_block: bool,
    *,
    fill: float,
) -> Tensor:
    batch, seq_len, num_heads, head_dim = shape
    heads = "(r a)" if is_block else "(a r)"
    dense = x.new_full((len(x), x.shape[1], rate, x.shape[2], head_dim), fill)
    split = rearrange(dense, f"g m r1 {heads} d -> g m r1 a r d", r=rate)
    diagonal = torch.diagonal(split, dim1=2, dim2=4)
    diagonal.copy_(rearrange(x, f"g m {heads} d -> g m a d r", r=rate))
    dense = rearrange(dense, "g m r1 h d -> g (m r1) h d")[:, :segment_length]
    dense = rearrange(dense, "(b g) w h d -> b (g w) h d", b=batch)
    return dense[:, :seq_len, :num_heads]


def _pad(x: Tensor, *, rows: int, heads: int = 0) -> Tensor:
    return functional.pad(x, (0, 0, 0, heads, 0, rows)) if rows or heads else x


def released_pipeline(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, *, is_causal: bool = True
) -> Tensor:
    """The usual pipeline with the data movement of the code that published weights came with.

    Step by step as in microsoft/torchscale, `component/dilated_attention.py`, commit 4d1e0e8: heads
    come first in memory, kept rows are copied twice, outputs are put on the diagonals of zeros, and
    the branches are added up one by one. `usual_pipeline` does with fewer copies.
    """
    _check_padding(pattern, is_causal)
    if pattern.head_offset != "block":
        raise ValueError(f"released code has head_offset='block', got {pattern.head_offset!r}.")
    batch, seq_len, num_heads, _ = q.shape
    by_head = [rearrange(x, "b n h d -> b h n d").contiguous().transpose(1, 2) for x in (q, k, v)]
    outs, lses = [], []
    for segment_length, rate in pattern.branches:
        segment_length = min(segment_length, seq_len)
        kept = (_gather(x, segment_length, rate, True)[:, :, :num_heads] for x in by_head)
        kept = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in kept)
        out, lse = _KernelWithLse.apply(*kept, is_causal)
        crop = (slice(None), slice(None, seq_len))
        out = _on_diagonals(out, rate)[:, :num_heads, :segment_length]
        lse = _on_diagonals(lse[..., None], rate)[:, :num_heads, :segment_length]
        lse = lse.masked_fill(lse == 0, -1e8)
        outs.append(rearrange(out, "(b g) h w d -> (b h) (g w) d", b=batch)[crop])
        lses.append(rearrange(lse, "(b g) h w d -> (b h) (g w) d", b=batch)[crop])
    with torch.no_grad():
        highest = torch.stack(lses).max(0)[0]
        weights = [torch.exp(lse - highest) for lse in lses]
        total = torch.stack(weights).sum(0)
    mixed = torch.zeros_like(outs[0])
    for out, weight in zip(outs, weights, strict=True):
        mixed += out * (weight / total)
    return rearrange(mixed, "(b h) n d -> b n h d", b=batch)


def _on_diagonals(x: Tensor, rate: int) -> Tensor:
    """Rows (g, m, h, d) among zeros, (g, h, m * r, d)."""
    x = _pad(x, rows=0, heads=-x.shape[2] % rate)
    x = rearrange(x, "g m (r a) d -> g m a d r", r=rate)
    return rearrange(torch.diag_embed(x), "g m a d r1 r2 -> g (r2 a) (m r1) d")


def bare_kernel_calls(
    q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor, pattern: DilatedPattern
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that run the kernel forward and backward on contiguous blocks of the same sizes.

    Nothing is selected and nothing merged: the least that a schedule of these blocks can take.
    Blocks lie at the start of the memory of contiguous q, k, v and out_grad (q stands for the
    output), and hold other rows than a pattern would take. Causal, for a seq_len that segments
    divide, and segments that rates divide.
    """
    batch, seq_len, num_heads, head_dim = q.shape
    blocks = []
    for segment_length, rate in pattern.branches:
        shape = (batch * seq_len // segment_length, num_heads, segment_length // rate, head_dim)
        tensors = [x.view(-1)[: math.prod(shape)].view(shape) for x in (out_grad, q, k, v, q)]
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
