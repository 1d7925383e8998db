"""Dilated attention (LongNet, arXiv 2307.02486), exact, forward and backward.

    out_i = sum_b sum_j exp(s_ij) v_j / sum_b sum_j exp(s_ij),    s_ij = scale * q_i . k_j + bias_ij

Branch b of the pattern shows query i the keys j of `DilatedPattern`. This is the paper's mixture of
branches by their softmax denominators (Eq. 9-10): one softmax over the multiset union of keys.
`extra_branches` add to it what blocks, hashes or masks show (`branches.py`).
Unlike torchscale, gradients flow through the mixture, padding takes no part, and head offsets
follow the paper (Eq. 13); `DilatedPattern(head_offset="block", padded_keys="zero")` gives the
published weights what they were trained with.

Shape legend: b batch, n seq_len, h num_heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import check_arguments, check_numbers, is_negative
from .branch_checks import check_branch_types, check_extra_branches
from .branched_attention import branched_attention
from .branches import ExtraBranch
from .custom_op import Options
from .pattern import DilatedPattern
from .positions import check_xpos_range

__all__ = ["DistanceBias", "dilated_attention"]

# Maps int64 distances (key position - query position), (m,), to additive logits (num_heads, m).
DistanceBias = Callable[[Tensor], Tensor]


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Tensor | DistanceBias | None = None,
    xpos_scale_base: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_lse: bool = False,
    extra_branches: Sequence[ExtraBranch] = (),
) -> Any:
    """Attends long sequences by a dilated pattern.

    A row that no branch covers (possible only without a branch of rate 1), or whose keys are all
    padding, gives zeros and an LSE of -inf. Gradients are by `backward` and of first order only:
    torch.func.grad and a second derivative raise; to forward mode (torch.func.jvp) it is a
    constant, as every custom operator of PyTorch.

    Args:
        q: Queries, (batch, seq_len, num_heads, head_dim); float16, bfloat16, float32 or float64.
        k: Keys, (batch, seq_len, num_kv_heads, head_dim); num_kv_heads divides num_heads, and
            query head i reads key head i // (num_heads // num_kv_heads).
        v: Values, like k.
        pattern: Which keys a query sees; any seq_len >= 1 fits any pattern. None: those of
            `extra_branches` alone.
        is_causal: Whether a query sees only the keys up to itself.
        scale: Factor on the dot products; 1 / sqrt(head_dim) if None.
        bias: Added to the logits. A tensor (batch or 1, num_heads or 1, seq_len, seq_len), or a
            function of int64 distances (key position minus query position), (m,), that returns
            (num_heads, m), such as ALiBi. Gradients flow to it.
        xpos_scale_base: If given, the share of channels 2c and 2c + 1 in the dot product of query i
            and key j is multiplied by zeta_c ** ((i - j) / xpos_scale_base), with
            zeta_c = (2c / head_dim + 0.4) / 1.4: the decay of xPos (arXiv 2212.10554), whose
            rotation is `apply_rotary`.
        key_padding_mask: Bool, (batch, seq_len), True at padding, which gives zeros and takes no
            softmax mass. A right-padded row is treated as the shorter sequence it is.
        cu_seqlens: int32, (num_sequences + 1,), rising from 0 to seq_len, with batch 1: sequences
            packed in one row, each attended by itself, its segments starting at its start.
        dropout_p: Probability of dropping an attention weight, in [0, 1).
        backend: `"auto"`, or a name of `ops.kernels.BACKENDS`. A gradient that flows in through
            the LSE is computed by a kernel that serves it where the named one does not.
        return_lse: Whether to return the log-sum-exp as well.
        extra_branches: Further branches of the same softmax: `BlockSparse`, `BigBirdBlocks`,
            `HashBuckets` and `TokenSubset`. Not with bias, xpos_scale_base or dropout.

    Returns:
        The output, (batch, seq_len, num_heads, head_dim), dtype of q; with `return_lse` also the
        natural-log LSE, (batch, seq_len, num_heads), float32 (float64 for float64 input).

    Raises:
        ValueError: If shapes, dtypes or values do not fit, with the values.
        TypeError: If an argument is of the wrong kind.
        NotImplementedError: If a named backend or a branch cannot serve the call, with the reason.
        RuntimeError: If the package of a named backend is absent or broken, with the cure.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4096, 8, 64).unbind(0)
        >>> out = dilated_attention(q, k, v, DilatedPattern.geometric(512, 4096), is_causal=True)
    """
    if not extra_branches and scale is not None and is_negative(scale):
        # Kernels hide keys before they scale, which gives NaN.
        q, scale = q * scale, 1.0
    options = checked_options(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        scale=scale,
        bias=bias,
        xpos_scale_base=xpos_scale_base,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        dropout_p=dropout_p,
        backend=backend,
        return_lse=return_lse,
        seed=torch.randint(2**62, (), dtype=torch.int64) if dropout_p else None,
        extra_branches=extra_branches,
    )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if extra_branches:
        out, lse = branched_attention(q, k, v, extra_branches, options)
    else:
        out, lse = torch.ops.longnet_zoo.dilated_attention(q, k, v, *options)
    return (out, lse) if return_lse else out


def checked_options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern | None,
    *,
    is_causal: bool,
    scale: float | None,
    bias: Tensor | DistanceBias | None,
    xpos_scale_base: float | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
    backend: str,
    return_lse: bool,
    seed: Tensor | None,
    seq_len: int | None = None,
    extra_branches: Sequence[ExtraBranch] = (),
) -> Options:
    """Checks the arguments of `dilated_attention` and makes those of the custom op.

    `seq_len` are the tokens of the whole sequence, where q, k and v hold a part of one.
    """
    check_branch_types(extra_branches, scale)
    only_extra = pattern is None and len(extra_branches) > 0
    pattern = _ANY_PATTERN if only_extra else pattern
    check_arguments(q, k, v, pattern, bias, key_padding_mask, cu_seqlens, dropout_p, backend)
    assert pattern is not None
    check_numbers(scale=scale, xpos_scale_base=xpos_scale_base)
    if extra_branches:
        check_extra_branches(
            q, extra_branches, bias=bias, xpos_scale_base=xpos_scale_base, dropout_p=dropout_p
        )
    head_dim = q.shape[3]
    span = min(pattern.segment_lengths[-1], q.shape[1] if seq_len is None else seq_len)
    if xpos_scale_base is not None:
        check_xpos_range(
            span=span,
            head_dim=head_dim,
            scale_base=xpos_scale_base,
            is_causal=is_causal,
            dtype=q.dtype,
        )
    return Options(
        dense_bias=bias if isinstance(bias, Tensor) else None,
        distance_bias=_distance_table(bias, span, q) if callable(bias) else None,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        seed=seed,
        segment_lengths=() if only_extra else pattern.segment_lengths,
        dilation_rates=() if only_extra else pattern.dilation_rates,
        head_offset=pattern.head_offset,
        padded_keys=pattern.padded_keys,
        first_head=pattern.first_head,
        total_heads=pattern.total_heads,
        is_causal=is_causal,
        scale=head_dim**-0.5 if scale is None else scale,
        xpos_scale_base=xpos_scale_base,
        dropout_p=dropout_p,
        backend=backend,
        return_lse=return_lse,
    )


# Stands in for no pattern where a call is checked.
_ANY_PATTERN = DilatedPattern(segment_lengths=(1,), dilation_rates=(1,))


def _distance_table(bias: DistanceBias, span: int, q: Tensor) -> Tensor:
    """Evaluates the bias at every distance inside a segment: (num_heads, 2 * span - 1)."""
    table = bias(torch.arange(1 - span, span, device=q.device))
    if not isinstance(table, Tensor):
        raise TypeError(
            f"bias must map distances (m,) to a tensor (num_heads, m), got {type(table).__name__}."
        )
    if table.shape != (q.shape[2], 2 * span - 1):
        raise ValueError(
            "bias must map distances (m,) to logits (num_heads, m), got "
            f"{tuple(table.shape)} for num_heads={q.shape[2]} and m={2 * span - 1}."
        )
    if not table.is_floating_point():
        raise TypeError(
            f"bias must return floating point, added to the logits, got {table.dtype}. "
            "To hide keys return -inf."
        )
    if table.device != q.device:
        raise ValueError(
            f"bias must return logits on the device of q, got {table.device} and {q.device}."
        )
    return table
