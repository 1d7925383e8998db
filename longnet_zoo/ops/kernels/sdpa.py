"""The block primitive with PyTorch's flash attention kernels, on CPU and CUDA.

The backward kernels take the out and LSE they are given, so they serve a block of a larger softmax.

Shape legend: b batch, t rows, u heads, d head_dim. PyTorch's layout is (b, u, t, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import BlockOptions, Call

__all__ = ["NAME", "backward", "forward", "supports"]

NAME = "sdpa"

_aten = torch.ops.aten
_DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}
_MAX_HEAD_DIM = 256


def supports(call: Call) -> str | None:
    """Says why a call cannot be served, or None."""
    if call.device_type not in _DTYPES:
        return f"needs a device among {tuple(_DTYPES)}, got {call.device_type!r}"
    if call.dtype not in _DTYPES[call.device_type]:
        return f"does not support {call.dtype} on {call.device_type!r}"
    if call.device_type == "cuda" and (call.head_dim % 8 or call.head_dim > _MAX_HEAD_DIM):
        return f"needs a head_dim divisible by 8 and at most 256 on CUDA, got {call.head_dim}"
    return call.below_capability((8, 0)) or call.beyond_fused()


def forward(q: Tensor, k: Tensor, v: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """Attends one block: out (b, t, u, d), dtype of q, and lse (b, t, u), at least float32."""
    rows = _transposed(q, k, v)
    if q.is_cuda:
        attend = _aten._scaled_dot_product_flash_attention
    else:
        attend = _aten._scaled_dot_product_flash_attention_for_cpu
        # All keys are read for each few queries: packed rows are a tenth faster, copy included.
        # A key head that several query heads share would be copied for each of them.
        rows = tuple(x if x.stride(1) == 0 else x.contiguous() for x in rows)
    out, lse, *_ = attend(*rows, 0.0, options.is_causal, scale=options.scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


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
    saved = (*_transposed(out_grad, q, k, v, out), lse.transpose(1, 2))
    if q.is_cuda:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read only by dropout
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *saved[:-1],
            saved[-1].contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            options.is_causal,
            rng_state,
            rng_state,
            scale=options.scale,
        )
    else:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *saved, 0.0, options.is_causal, scale=options.scale
        )
    q_grad, k_grad, v_grad = _transposed(*grads)
    return q_grad, k_grad, v_grad


def _transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)
