"""What the three generations of flash-attn have in common.

Shape legend: b batch, t rows, u heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import BlockOptions, Call

__all__ = ["laid_out", "lse_to_flash", "unrepeated", "unsupported"]

_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def unsupported(call: Call, *, majors: range, max_head_dim: int) -> str | None:
    """Says why flash-attn cannot serve a call, or None.

    Args:
        call: What is asked for.
        majors: Major compute capabilities that the kernels were written for.
        max_head_dim: Largest size of a head.
    """
    if call.device_type != "cuda":
        return f"needs a CUDA device, got {call.device_type!r}"
    if call.capability is None or call.capability[0] not in majors:
        chips = f"{majors[0]}.x" if len(majors) == 1 else f"{majors[0]}.x to {majors[-1]}.x"
        found = ".".join(map(str, call.capability or ("none",)))
        return f"needs a GPU of compute capability {chips}, got {found}"
    if call.dtype not in _DTYPES:
        return f"does not support {call.dtype}"
    if call.head_dim % 8 or call.head_dim > max_head_dim:
        return f"needs a head_dim divisible by 8 and at most {max_head_dim}, got {call.head_dim}"
    return call.beyond_fused()


def unrepeated(options: BlockOptions, *kv: Tensor) -> list[Tensor]:
    """Keeps one of the equal key heads (b, t, u, d): the kernels serve groups of query heads."""
    return [x[:, :, :1] if options.is_kv_shared else x for x in kv]


def laid_out(*tensors: Tensor) -> list[Tensor]:
    """Copies tensors that cannot be loaded in pieces of 16 bytes, or that repeat themselves."""
    return [x if _is_loadable(x) else x.contiguous() for x in tensors]


def _is_loadable(x: Tensor) -> bool:
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    is_aligned = all(step * x.element_size() % _ALIGNMENT_BYTES == 0 for step in steps)
    return is_aligned and 0 not in steps and x.data_ptr() % _ALIGNMENT_BYTES == 0


def lse_to_flash(lse: Tensor) -> Tensor:
    """Turns an LSE (b, t, u) into the contiguous (b, u, t) whose strides are not read."""
    return lse.transpose(1, 2).contiguous()
