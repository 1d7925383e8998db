"""The block primitive with flash-attn 2 (package `flash_attn`): Ampere and newer, half types.

Called below its autograd functions, since the backward takes the out and LSE of the whole softmax.
It also serves packed sequences, many blocks of different lengths in one call.

Shape legend: b batch, t rows, u heads, d head_dim, m rows of all packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import BlockOptions, Call
from .flash_parts import laid_out, lse_to_flash, unrepeated, unsupported
from .packages import OptionalPackage

__all__ = [
    "NAME",
    "PACKAGE",
    "backward",
    "backward_packed",
    "forward",
    "forward_packed",
    "supports",
]

NAME = "flash2"


class _Functions(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    forward_packed: Callable[..., Any]
    backward_packed: Callable[..., Any]


def _load() -> _Functions:
    interface = import_module("flash_attn.flash_attn_interface")
    return _Functions(
        forward=interface._flash_attn_forward,
        backward=interface._flash_attn_backward,
        forward_packed=interface._flash_attn_varlen_forward,
        backward_packed=interface._flash_attn_varlen_backward,
    )


PACKAGE = OptionalPackage(
    modules=("flash_attn.flash_attn_interface",),
    install="pip install 'flash-attn>=2.7' --no-build-isolation",
    load=_load,
)


def supports(call: Call) -> str | None:
    """Says why a call cannot be served, or None."""
    return unsupported(call, majors=range(8, 13), max_head_dim=256)


def forward(q: Tensor, k: Tensor, v: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """Attends one block: out (b, t, u, d) in the dtype of q, lse (b, t, u) in float32."""
    out, lse, *_ = _load().forward(
        *laid_out(q, *unrepeated(options, k, v)), **_settings(options), return_softmax=False
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
    out_grad, q, k, v, out = laid_out(out_grad, q, *unrepeated(options, k, v), out)
    q_grad, k_grad, v_grad = (x.new_empty(x.shape) for x in (q, k, v))
    _load().backward(
        *(out_grad, q, k, v, out, lse_to_flash(lse), q_grad, k_grad, v_grad),
        **_settings(options),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return q_grad, k_grad, v_grad


def forward_packed(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, max_rows: int, options: BlockOptions
) -> tuple[Tensor, Tensor]:
    """Attends packed sequences, each by itself.

    Args:
        q: Queries, (m, u, d).
        k: Keys, like q; the number of their heads divides that of q.
        v: Values, like k.
        bounds: Rows at which sequences begin and end, int32, (sequences + 1,).
        max_rows: Rows of the longest sequence.
        options: How to attend.

    Returns:
        The output, (m, u, d) in the dtype of q, and the LSE, (m, u) in float32.
    """
    out, lse, *_ = _load().forward_packed(
        *(*laid_out(q, k, v), bounds, bounds, max_rows, max_rows),
        **_settings(options),
        return_softmax=False,
    )
    return out, lse.transpose(0, 1)


def backward_packed(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    max_rows: int,
    options: BlockOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed sequences, given the out and LSE of the whole softmax."""
    out_grad, q, k, v, out = laid_out(out_grad, q, k, v, out)
    q_grad, k_grad, v_grad = (x.new_empty(x.shape) for x in (q, k, v))
    _load().backward_packed(
        *(out_grad, q, k, v, out, lse.transpose(0, 1).contiguous(), q_grad, k_grad, v_grad),
        *(bounds, bounds, max_rows, max_rows),
        **_settings(options),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return q_grad, k_grad, v_grad


def _settings(options: BlockOptions) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": options.scale,
        "causal": options.is_causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
