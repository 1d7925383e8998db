"""The block primitive in plain matrix products, a chunk of query rows at a time.

It serves every call: any floating dtype and device, bias with its gradient, hidden keys, dropout, a
gradient through the LSE. Half types are computed in float32.

Shape legend: b batch, t rows, u heads, d head_dim; logits are (b, u, rows of the chunk, keys). Keys
may be more or fewer rows than queries where attention is not causal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import BlockOptions, Call

__all__ = ["NAME", "backward", "forward", "supports"]

NAME = "math"

_MAX_LOGITS = 2**22
_MIN_ROWS = 64


def supports(call: Call) -> str | None:
    """Serves every call."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """Attends one block: out (b, t, u, d), dtype of q, and lse (b, t, u), at least float32."""
    q, k, v, dtype = *_computed(q, k, v), q.dtype
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for start, stop, num_keys in _chunks(q, k, options.is_causal):
        logits = _logits(q, k, start, stop, num_keys, options)
        chunk_lse = logits.logsumexp(-1, keepdim=True)
        weights = _weights(logits, chunk_lse)
        if options.dropout is not None:
            weights *= options.dropout.factors(weights.shape, start, weights.device)
        out[:, start:stop] = torch.einsum("buqk,bkud->bqud", weights, v[:, :num_keys])
        lse[:, start:stop] = chunk_lse.squeeze(-1).transpose(1, 2)
    return out.to(dtype), lse


def backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: BlockOptions,
    lse_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block, given the out and LSE of the whole softmax it is a part of.

    With P = exp(logits - lse) and delta = rowsum(out_grad * out) - lse_grad, the logits have the
    gradient P * (out_grad v^T - delta). A row whose `lse` is +inf has no gradient.
    """
    dtype = q.dtype
    q, k, v, out_grad, out = _computed(q, k, v, out_grad, out)
    delta = (out_grad * out).sum(-1)
    if lse_grad is not None:
        delta = delta - lse_grad
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, stop, num_keys in _chunks(q, k, options.is_causal):
        logits = _logits(q, k, start, stop, num_keys, options)
        weights = _weights(logits, lse[:, start:stop].transpose(1, 2).unsqueeze(-1))
        chunk_grad = out_grad[:, start:stop]
        weights_grad = torch.einsum("bqud,bkud->buqk", chunk_grad, v[:, :num_keys])
        dropped = weights
        if options.dropout is not None:
            factors = options.dropout.factors(weights.shape, start, weights.device)
            weights_grad, dropped = weights_grad * factors, weights * factors
        v_grad[:, :num_keys] += torch.einsum("buqk,bqud->bkud", dropped, chunk_grad)
        chunk_delta = delta[:, start:stop].transpose(1, 2).unsqueeze(-1)
        logits_grad = weights_grad.sub_(chunk_delta).mul_(weights)
        if options.bias is not None:
            options.bias.add_grad(logits_grad, start)
        logits_grad *= options.scale
        q_grad[:, start:stop] = torch.einsum("buqk,bkud->bqud", logits_grad, k[:, :num_keys])
        k_grad[:, :num_keys] += torch.einsum("buqk,bqud->bkud", logits_grad, q[:, start:stop])
    return q_grad.to(dtype), k_grad.to(dtype), v_grad.to(dtype)


def _computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def _chunks(q: Tensor, k: Tensor, is_causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first row, row after the last, number of keys they may see) of each chunk."""
    batch, num_rows, num_heads, _ = q.shape
    num_keys = k.shape[1]
    size = max(_MIN_ROWS, _MAX_LOGITS // (batch * num_heads * num_keys))
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        yield start, stop, stop if is_causal else num_keys


def _logits(
    q: Tensor, k: Tensor, start: int, stop: int, num_keys: int, options: BlockOptions
) -> Tensor:
    logits = torch.einsum("bqud,bkud->buqk", q[:, start:stop] * options.scale, k[:, :num_keys])
    if options.bias is not None:
        options.bias.add_to(logits, start)
    if options.is_causal:
        rows = torch.arange(start, stop, device=q.device)
        is_future = torch.arange(num_keys, device=q.device) > rows[:, None]
        logits.masked_fill_(is_future, float("-inf"))
    return logits


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    # exp(-inf - -inf) would be NaN for a row that sees no key; its weights are zero.
    return torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0))
