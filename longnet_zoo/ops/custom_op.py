"""Dilated attention as operators of PyTorch, with what `torch.compile` and autograd need of them.

Shape legend: b batch, n seq_len, h num_heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_softmax import FusedSoftmax
from .joint_softmax import JointSoftmax
from .kernels import Call, capability_of, choose_kernel, math, refusal_of, triton
from .merged_softmax import MergedSoftmax
from .packed_softmax import PackedSoftmax
from .pattern import DilatedPattern, HeadOffset, PaddedKeys
from .sequences import SequenceGroup, split_sequences

__all__ = ["OPTIONS_SCHEMA", "Options", "attend", "can_merge", "differentiate"]

# Elements of q that are attended at once; results beside the output take a few times as many.
_MAX_ELEMENTS = 2**30


class Options(NamedTuple):
    """What both custom ops take beside their tensors, in the order of `OPTIONS_SCHEMA`."""

    dense_bias: Tensor | None
    distance_bias: Tensor | None
    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    seed: Tensor | None
    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    head_offset: HeadOffset
    padded_keys: PaddedKeys
    first_head: int
    total_heads: int | None
    is_causal: bool
    scale: float
    xpos_scale_base: float | None
    dropout_p: float
    backend: str
    return_lse: bool

    @property
    def pattern(self) -> DilatedPattern:
        """The schedule."""
        return _pattern_of(
            tuple(self.segment_lengths),
            tuple(self.dilation_rates),
            self.head_offset,
            self.padded_keys,
            self.first_head,
            self.total_heads,
        )

    def sequences(self, q: Tensor) -> tuple[list[SequenceGroup], Tensor | None]:
        """Finds what is attended by itself, and padding that is not at the end of its row."""
        groups, is_hidden = split_sequences(
            q, self.key_padding_mask, self.cu_seqlens, is_single=self.dense_bias is not None
        )
        if is_hidden is not None and self.padded_keys == "zero":
            raise ValueError(
                "padded_keys='zero' has no meaning with padding before or between tokens; "
                "key_padding_mask must be right padding, or use padded_keys='ignore'."
            )
        return groups, is_hidden

    def call(
        self,
        q: Tensor,
        *,
        has_hidden_keys: bool,
        is_backward: bool = False,
        has_lse_grad: bool = False,
    ) -> Call:
        """Says what the kernel of one pass is asked for."""
        has_dropout = self.dropout_p > 0
        return Call(
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[3],
            capability=capability_of(q.device),
            has_dense_bias=self.dense_bias is not None,
            has_distance_bias=self.distance_bias is not None,
            has_hidden_keys=has_hidden_keys,
            has_unnested_xpos=self.xpos_scale_base is not None and not self.pattern.is_nested,
            has_dropout=has_dropout,
            # Kernels draw their own dropout: with it, both passes must make the same choice.
            is_backward=is_backward and not has_dropout,
            has_lse_grad=has_lse_grad or (has_dropout and self.return_lse),
        )

    def spans(self, q: Tensor) -> list[slice]:
        """Cuts a very long sequence where no branch crosses, for less memory beside the results.

        Zero keys fill a segment up to a length that depends on the whole sequence.
        """
        seq_len = q.shape[1]
        is_cuttable = self.pattern.is_nested and (self.padded_keys == "ignore" or self.is_causal)
        masks = (self.dense_bias, self.key_padding_mask, self.cu_seqlens)
        if not is_cuttable or any(mask is not None for mask in masks):
            return [slice(0, seq_len)]
        longest = self.segment_lengths[-1]
        num_segments = max(1, _MAX_ELEMENTS // (longest * q[:, 0].numel()))
        step = longest * num_segments
        return [slice(start, min(start + step, seq_len)) for start in range(0, seq_len, step)]

    def problem(
        self,
        q: Tensor,
        k: Tensor,
        *,
        first: int = 0,
        is_backward: bool = False,
        has_lse_grad: bool = False,
    ) -> JointSoftmax:
        """Finds the sequences and the kernel of a call, or of the part of one from row `first`."""
        groups, is_hidden = self.sequences(q)
        call = self.call(
            q,
            has_hidden_keys=is_hidden is not None,
            is_backward=is_backward,
            has_lse_grad=has_lse_grad,
        )
        kernel = choose_kernel(self.backend, call)
        has_own_keys = q.shape[2] == k.shape[2]
        return self.solver(kernel, call, groups, has_own_keys=has_own_keys)(
            pattern=self.pattern,
            kernel=kernel,
            groups=groups,
            is_causal=self.is_causal,
            scale=self.scale,
            xpos_scale_base=self.xpos_scale_base,
            is_hidden=is_hidden,
            dense_bias=self.dense_bias,
            distance_bias=self.distance_bias,
            dropout_p=self.dropout_p,
            seed=0 if self.seed is None else int(self.seed) + first,
        )

    def solver(
        self,
        kernel: ModuleType,
        call: Call,
        groups: list[SequenceGroup],
        *,
        has_own_keys: bool,
    ) -> type[JointSoftmax]:
        """Picks what makes most of a kernel for whole sequences."""
        if kernel is triton:
            return FusedSoftmax
        is_plain = call.beyond_fused() is None and not call.has_unnested_xpos
        can_pack = is_plain and self.padded_keys == "ignore" and hasattr(kernel, "forward_packed")
        if len(groups) > 1 and can_pack:
            return PackedSoftmax
        if is_plain and has_own_keys and kernel is not math and can_merge(call):
            return MergedSoftmax
        return JointSoftmax


@lru_cache
def _pattern_of(
    segment_lengths: tuple[int, ...],
    dilation_rates: tuple[int, ...],
    head_offset: HeadOffset,
    padded_keys: PaddedKeys,
    first_head: int,
    total_heads: int | None,
) -> DilatedPattern:
    # Asked for several times in every call, and its checks are not free.
    return DilatedPattern(
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        head_offset=head_offset,
        padded_keys=padded_keys,
        first_head=first_head,
        total_heads=total_heads,
    )


def can_merge(call: Call) -> bool:
    """Whether Triton is there to merge what another kernel finds."""
    return call.device_type == "cuda" and refusal_of(triton, call) is None


OPTIONS_SCHEMA = (
    "Tensor? dense_bias, Tensor? distance_bias, Tensor? key_padding_mask, Tensor? cu_seqlens, "
    "Tensor? seed, int[] segment_lengths, int[] dilation_rates, str head_offset, str padded_keys, "
    "int first_head, int? total_heads, bool is_causal, float scale, float? xpos_scale_base, "
    "float dropout_p, str backend, bool return_lse"
)


def attend(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The forward pass; options as in `Options`."""
    op = Options(*options)
    # Autocast would cast the float32 products inside the op back to half types.
    with torch.autocast(q.device.type, enabled=False):
        spans = op.spans(q)
        if len(spans) == 1:
            return op.problem(q, k).forward(q, k, v)
        out, lse = _fake_forward(q, k, v)
        for span in spans:
            rows = [x[:, span] for x in (q, k, v)]
            out[:, span], lse[:, span] = op.problem(*rows[:2], first=span.start).forward(*rows)
    return out, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


def differentiate(
    out_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass: gradients of q, k, v and of the bias, empty without one."""
    op = Options(*options)
    has_lse_grad = lse_grad is not None
    out_grad = out_grad if out_grad.stride(-1) == 1 else out_grad.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        spans = op.spans(q)
        if len(spans) == 1:
            problem = op.problem(q, k, is_backward=True, has_lse_grad=has_lse_grad)
            grads = problem.backward(out_grad, lse_grad, q, k, v, out, lse)
            return *grads[:3], q.new_empty(0) if grads[3] is None else grads[3]
        q_grad, k_grad, v_grad, bias_grad = _fake_backward(
            out_grad, lse_grad, q, k, v, out, lse, *options
        )
        bias_grad_sum = torch.zeros_like(bias_grad, dtype=lse.dtype)
        for span in spans:
            rows = [x[:, span] for x in (q, k, v, out, lse)]
            problem = op.problem(
                *rows[:2], first=span.start, is_backward=True, has_lse_grad=has_lse_grad
            )
            span_lse_grad = None if lse_grad is None else lse_grad[:, span]
            grads = problem.backward(out_grad[:, span], span_lse_grad, *rows)
            q_grad[:, span], k_grad[:, span], v_grad[:, span] = grads[:3]
            if grads[3] is not None:
                bias_grad_sum += grads[3]
    return q_grad, k_grad, v_grad, bias_grad_sum.to(bias_grad.dtype)


def _fake_backward(
    out_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense, distance = options[:2]
    bias = dense if dense is not None else distance
    bias_grad = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    options = Options(*inputs[3:])
    tensors = options[:5]
    ctx.options = options[5:]
    ctx.save_for_backward(*inputs[:3], *output, *tensors)
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, out_grad: Tensor | None, lse_grad: Tensor | None) -> Any:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = Options(*tensors, *ctx.options)
    if not options.return_lse:
        lse_grad = None
    if out_grad is None:
        out_grad = torch.zeros_like(out)
    *grads, bias_grad = torch.ops.longnet_zoo.dilated_attention_backward(
        out_grad, lse_grad, q, k, v, out, lse, *options
    )
    dense_grad = bias_grad if options.dense_bias is not None else None
    distance_grad = bias_grad if options.distance_bias is not None else None
    return *grads, dense_grad, distance_grad, *(None,) * (len(options) - 2)


_custom_op = torch.library.custom_op(
    "longnet_zoo::dilated_attention",
    attend,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
)
_custom_op.register_fake(_fake_forward)
_custom_op.register_autograd(_chain, setup_context=_save)
_custom_backward = torch.library.custom_op(
    "longnet_zoo::dilated_attention_backward",
    differentiate,
    mutates_args=(),
    schema=(
        "(Tensor out_grad, Tensor? lse_grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
_custom_backward.register_fake(_fake_backward)
