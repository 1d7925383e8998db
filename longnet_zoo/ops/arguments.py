"""Checks of the public attention op: one clear error for input that cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .kernels import BACKENDS
from .pattern import DilatedPattern

__all__ = ["can_read", "check_arguments", "check_numbers", "is_negative"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def can_read(x: Tensor) -> bool:
    """Whether the values of a tensor can be read, so that checks of them are possible.

    They cannot be where there are none (fake and meta tensors), while a graph is compiled or
    exported, and while a CUDA graph is captured, which a read would end.
    """
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern | None,
    bias: Tensor | Callable[[Tensor], Tensor] | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
    backend: str,
) -> None:
    """Checks shapes, dtypes and ranges; values inside tensors are checked where they are read."""
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}.")
    _check_qkv(q, k, v)
    for name, option in (
        ("bias", bias),
        ("key_padding_mask", key_padding_mask),
        ("cu_seqlens", cu_seqlens),
    ):
        if isinstance(option, Tensor) and option.device != q.device:
            raise ValueError(
                f"{name} must be on the device of q, got {option.device} and {q.device}."
            )
    if bias is not None:
        _check_bias(q, bias)
    if key_padding_mask is not None:
        _check_mask(q, key_padding_mask)
    if cu_seqlens is not None:
        _check_cu_seqlens(q, cu_seqlens, key_padding_mask)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")


def is_negative(scale: object) -> bool:
    """Whether a scale is a finite number of 0 or less."""
    return isinstance(scale, (int, float)) and -math.inf < scale <= 0


def check_numbers(**options: object) -> None:
    """Checks that options are None or numbers; a tensor would lose its gradient unseen."""
    for name, value in options.items():
        if isinstance(value, (Tensor, str)):
            raise TypeError(
                f"{name} must be a number, got {type(value).__name__}. To learn it, multiply q by "
                "a parameter."
            )
        if name == "scale" and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"scale must be finite, got {value}. The default is head_dim ** -0.5.")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have the shape (batch, seq_len, num_heads, head_dim), "
                f"got {tuple(x.shape)}."
            )
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "q, k and v must share one dtype of float16, bfloat16, float32 and float64, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}. Cast them to one dtype."
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}."
        )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k and v must not be empty, got {shapes}.")
    if k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            "q, k and v must agree in batch, seq_len and head_dim, and k and v in num_heads, "
            f"got {shapes}."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key heads, "
            f"got {q.shape[2]} and {k.shape[2]}."
        )


def _check_bias(q: Tensor, bias: Tensor | Callable[[Tensor], Tensor]) -> None:
    if not isinstance(bias, Tensor):
        if not callable(bias):
            raise TypeError(
                f"bias must be a tensor or a function of distances, got {type(bias).__name__}."
            )
        return
    batch, seq_len, num_heads, _ = q.shape
    allowed = ((1, batch), (1, num_heads), (seq_len,), (seq_len,))
    if bias.ndim != 4 or any(size not in ok for size, ok in zip(bias.shape, allowed, strict=True)):
        raise ValueError(
            "bias must have the shape (batch or 1, num_heads or 1, seq_len, seq_len), got "
            f"{tuple(bias.shape)} for {batch=}, {num_heads=} and {seq_len=}."
        )
    if not bias.is_floating_point():
        raise TypeError(
            f"bias must be floating point, added to the logits, got {bias.dtype}. "
            "For padding pass key_padding_mask."
        )


def _check_mask(q: Tensor, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"key_padding_mask must be a bool tensor, True at padding, got {kind}. "
            "Turn a mask of ones at tokens into `mask == 0`."
        )
    if mask.shape != q.shape[:2]:
        raise ValueError(
            "key_padding_mask must have the shape (batch, seq_len) = "
            f"{tuple(q.shape[:2])}, got {tuple(mask.shape)}."
        )


def _check_cu_seqlens(q: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {kind}.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens must have the shape (num_sequences + 1,) with at least one sequence, "
            f"got {tuple(cu_seqlens.shape)}."
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs sequences packed in one row (batch 1), got batch={q.shape[0]}. "
            "Flatten the batch into the sequence."
        )
    if mask is not None:
        raise ValueError(
            "give either cu_seqlens or key_padding_mask, not both: leave padding out of the row."
        )
