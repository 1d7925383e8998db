"""The block primitive with flash-attn 4 (`flash_attn.cute`): Hopper and Blackwell, half types.

PyTorch's own `torch.nn.attention.activate_flash_attention_impl("FA4")` makes the same kernels serve
the backend "sdpa", and every other attention of the process; this adapter changes nothing globally.

Shape legend: b batch, t rows, u heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .call import BlockOptions, Call
from .flash_parts import laid_out, lse_to_flash, unrepeated, unsupported
from .packages import OptionalPackage

__all__ = ["NAME", "PACKAGE", "backward", "forward", "supports"]

NAME = "flash4"

_HOPPER = 9


def _load() -> tuple[Callable[..., Any], Callable[..., Any]]:
    interface = import_module("flash_attn.cute.interface")
    return interface._flash_attn_fwd, interface._flash_attn_bwd


PACKAGE = OptionalPackage(
    # flash-attn 2 carries an early `flash_attn.cute` without what it needs.
    modules=("flash_attn.cute.interface", "cutlass", "quack"),
    install="pip install --pre flash-attn-4",
    load=_load,
)


def supports(call: Call) -> str | None:
    """Says why a call cannot be served, or None."""
    is_hopper = call.capability is not None and call.capability[0] == _HOPPER
    max_head_dim = 256 if is_hopper else 128
    return unsupported(call, majors=range(_HOPPER, 11), max_head_dim=max_head_dim)


def forward(q: Tensor, k: Tensor, v: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """Attends one block: out (b, t, u, d) in the dtype of q, lse (b, t, u) in float32."""
    attend, _ = _load()
    out, lse, *_ = attend(
        *laid_out(q, *unrepeated(options, k, v)),
        softmax_scale=options.scale,
        causal=options.is_causal,
        return_lse=True,
    )
    return out, lse.transpose(1, 2)


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
    _, differentiate = _load()
    out_grad, q, k, v, out = laid_out(out_grad, q, *unrepeated(options, k, v), out)
    q_grad, k_grad, v_grad, *_ = differentiate(
        q,
        k,
        v,
        out,
        out_grad,
        lse_to_flash(lse),
        softmax_scale=options.scale,
        causal=options.is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return q_grad, k_grad, v_grad
