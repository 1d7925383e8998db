"""The block primitive with flash-attn 3 (module `flash_attn_interface`): Hopper, half types.

Its operators are called directly: they kept their order of arguments while the Python functions
above them changed theirs.

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

NAME = "flash3"

_NO_CACHE = (None,) * 4  # new keys, new values, values of queries, out
_NO_VARLEN = (None,) * 7  # boundaries and used lengths of q, k and new keys, longest q and k
_NO_PAGES_ROTARY_SCALES = (None,) * 9


def _load() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import_module("flash_attn_interface")
    operators = torch.ops.flash_attn_3
    return operators.fwd, operators.bwd


PACKAGE = OptionalPackage(
    modules=("flash_attn_interface",),
    install="build it from the folder hopper/ of github.com/Dao-AILab/flash-attention",
    load=_load,
)


def supports(call: Call) -> str | None:
    """Says why a call cannot be served, or None."""
    return unsupported(call, majors=range(9, 10), max_head_dim=256)


def forward(q: Tensor, k: Tensor, v: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """Attends one block: out (b, t, u, d) in the dtype of q, lse (b, t, u) in float32."""
    attend, _ = _load()
    out, lse, *_ = attend(
        *laid_out(q, *unrepeated(options, k, v)),
        *_NO_CACHE,
        *_NO_VARLEN,
        *_NO_PAGES_ROTARY_SCALES,
        options.scale,
        options.is_causal,
        num_splits=1,
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
    q_grad, k_grad, v_grad = (x.new_empty(x.shape) for x in (q, k, v))
    differentiate(
        out_grad,
        q,
        k,
        v,
        out,
        lse_to_flash(lse),
        q_grad,
        k_grad,
        v_grad,
        *(None,) * 6,  # boundaries and used lengths of q and k, longest q and k
        options.scale,
        options.is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return q_grad, k_grad, v_grad
