"""The block primitive with cuDNN's attention kernel through PyTorch: CUDA, half types.

Shape legend: b batch, t rows, u heads, d head_dim. PyTorch's layout is (b, u, t, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import math
from .call import BlockOptions, Call

__all__ = ["NAME", "backward", "forward", "supports"]

NAME = "cudnn"

_aten = torch.ops.aten
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 128


def supports(call: Call) -> str | None:
    """Says why a call cannot be served, or None."""
    if call.device_type != "cuda":
        return f"needs a CUDA device, got {call.device_type!r}"
    if call.dtype not in _DTYPES:
        return f"does not support {call.dtype}"
    if call.head_dim % 8 or call.head_dim > _MAX_HEAD_DIM:
        return f"needs a head_dim divisible by 8 and at most 128, got {call.head_dim}"
    if _must_repeat():
        return "does not repeat its results, as torch.use_deterministic_algorithms(True) wants"
    return call.below_capability((8, 0)) or call.beyond_fused()


def _must_repeat() -> bool:
    is_wanted = torch.are_deterministic_algorithms_enabled()
    return is_wanted and not torch.is_deterministic_algorithms_warn_only_enabled()


def forward(q: Tensor, k: Tensor, v: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """Attends one block: out (b, t, u, d) in the dtype of q, lse (b, t, u) in float32."""
    if 1 in (q.shape[1], k.shape[1]):  # cuDNN has no attention to a single key
        return math.forward(q, k, v, options)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, options.is_causal, scale=options.scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[:3]).transpose(1, 2)


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
    """Gradients of a block, given the out and LSE of the whole softmax it is a part of."""
    if 1 in (q.shape[1], k.shape[1]):
        return math.backward(out_grad, q, k, v, out, lse, options, lse_grad)
    rng_state = torch.zeros((), dtype=torch.int64, device=q.device)  # read only by dropout
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        *(tensor.transpose(1, 2) for tensor in (out_grad, q, k, v, out)),
        lse.transpose(1, 2).contiguous().unsqueeze(-1),
        rng_state,
        rng_state,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        options.is_causal,
        scale=options.scale,
    )
    q_grad, k_grad, v_grad = (grad.transpose(1, 2) for grad in grads)
    return q_grad, k_grad, v_grad
