"""Dilated attention of sequences that are split over processes, exact, forward and backward.

Each process attends to its own tokens while the sparsified keys and values of the segments that it
shares with others travel; those then join the same softmax. Earlier processes' keys are seen in
full, its own causally. Rows of a segment keep the numbers that they have in the whole one, so head
offsets, positions and zero keys do not depend on where the borders lie.

Shape legend: b batch, c tokens of a part, h heads, d head_dim, m rows that travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longnet_zoo.ops.custom_op import OPTIONS_SCHEMA, Options
from longnet_zoo.ops.dilated_attention import DistanceBias, checked_options
from longnet_zoo.ops.joint_softmax import JointSoftmax
from longnet_zoo.ops.kernels import Call, choose_kernel, triton
from longnet_zoo.ops.pattern import DilatedPattern

from .agreement import check_alike
from .collectives import group_named
from .exchange import (
    Exchange,
    Region,
    is_as_whole,
    plan_exchange,
    regions_of,
)
from .sequences import FoundSequences, SplitSequences, check_bias, find_sequences
from .shared_softmax import SharedSoftmax

__all__ = ["parallel_dilated_attention"]


def parallel_dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    mesh: DeviceMesh,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    bias: DistanceBias | None = None,
    xpos_scale_base: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_lse: bool = False,
    found: FoundSequences | None = None,
) -> Any:
    """Attends by a dilated pattern to sequences of which each process of a mesh has a part.

    Process p of the group holds the positions [p * c, (p + 1) * c). Branches and segments may cross
    these borders in any way. What travels is what a segment shares: for causal attention, one
    process gets of each branch at most segment_length / dilation_rate rows of a head, whatever the
    length of the sequence. Its gradients come back in float32.

    Args:
        q: Queries of this process, (batch, c, num_heads, head_dim); c is the same everywhere.
        k: Its keys, (batch, c, num_kv_heads, head_dim).
        v: Its values, like k.
        pattern: Which keys a query sees, by places in the whole sequence.
        mesh: The processes, in the order of the parts; one dimension.
        is_causal: As for `dilated_attention`; all options must be the same on all processes.
        scale: As for `dilated_attention`.
        bias: A function of distances, as for `dilated_attention`.
        xpos_scale_base: As for `dilated_attention`.
        key_padding_mask: True at padding, bool (batch, c), or None on all processes. Where all
            padding is at the end of the whole sequence, that is treated as the shorter one it is.
        cu_seqlens: Boundaries of packed sequences in the whole row, the same on all processes,
            int32 (num_sequences + 1,), from 0; what lies behind the last one is padding.
        dropout_p: As for `dilated_attention`; each process draws its own.
        backend: As for `dilated_attention`; a kernel that attends to blocks.
        return_lse: As for `dilated_attention`.
        found: What `find_sequences` found in the mask and the boundaries, where several layers
            have the same; None: it is asked for, which takes a small collective.

    Returns:
        What `dilated_attention` returns for the whole sequence, cut to this process's part.

    Raises:
        ValueError: As `dilated_attention`; or the processes hold parts of different shapes.
        TypeError: As `dilated_attention`.
        NotImplementedError: As `dilated_attention`; or `bias` is a tensor of pairs.
    """
    check_bias(bias)
    group = mesh.get_group()
    if found is None:
        check_alike(q, group, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens)
        found = find_sequences(q, key_padding_mask, cu_seqlens, group)
    sequences, is_hidden = found
    options = checked_options(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        scale=scale,
        bias=bias,
        xpos_scale_base=xpos_scale_base,
        key_padding_mask=None,
        cu_seqlens=None,
        dropout_p=dropout_p,
        backend=backend,
        return_lse=return_lse,
        seed=torch.randint(2**62, (), dtype=torch.int64) if dropout_p else None,
        seq_len=sequences.longest,
    )
    if is_hidden is not None and pattern.padded_keys == "zero":
        raise ValueError(
            "padded_keys='zero' has no meaning with padding before or between tokens; "
            "key_padding_mask must be right padding, or use padded_keys='ignore'."
        )
    out, lse, *_ = torch.ops.longnet_zoo.parallel_dilated_attention(
        *(x.contiguous() for x in (q, k, v)),
        is_hidden,
        sequences.lengths,
        sequences.bounds,
        group.group_name,
        *options,
    )
    return (out, lse) if return_lse else out


def _problem(
    q: Tensor,
    k: Tensor,
    is_hidden: Tensor | None,
    lengths: Sequence[int],
    bounds: Sequence[int],
    group_name: str,
    options: Options,
    **direction: bool,
) -> SharedSoftmax:
    group = group_named(group_name)
    part = group.rank()
    sequences = _sequences(q, lengths, bounds, group)
    plan = plan_exchange(
        sequences,
        part,
        options.pattern,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        is_causal=options.is_causal,
        device=q.device,
    )
    groups = sequences.groups(part)
    call = options.call(q, has_hidden_keys=is_hidden is not None, **direction)
    # Triton's kernels serve whole sequences: what comes from elsewhere goes to another one.
    backend = "auto" if options.backend == triton.NAME else options.backend
    problem = SharedSoftmax(
        pattern=options.pattern,
        kernel=choose_kernel(backend, replace(call, is_block=True)),
        groups=groups,
        is_causal=options.is_causal,
        scale=options.scale,
        xpos_scale_base=options.xpos_scale_base,
        is_hidden=is_hidden,
        dense_bias=None,
        distance_bias=options.distance_bias,
        dropout_p=options.dropout_p,
        # Hashed with the number of the call: processes that share a seed draw apart.
        seed=0 if options.seed is None else int(options.seed) + part,
        exchange=Exchange(plan, group),
    )
    return replace(
        problem, own=_own_problem(problem, sequences, options, call, q.shape[2], k.shape[2])
    )


def _sequences(
    q: Tensor, lengths: Sequence[int], bounds: Sequence[int], group: dist.ProcessGroup
) -> SplitSequences:
    return SplitSequences(
        part_length=q.shape[1],
        num_parts=group.size(),
        lengths=tuple(lengths),
        bounds=tuple(bounds),
    )


def _own_problem(
    problem: SharedSoftmax,
    sequences: SplitSequences,
    options: Options,
    call: Call,
    num_heads: int,
    num_kv_heads: int,
) -> JointSoftmax | None:
    """The part as whole sequences, if they have the same blocks and a solver of their own."""
    groups = [replace(group, start=0, whole_length=None) for group in problem.groups]
    kernel = choose_kernel(options.backend, call)
    solver = options.solver(kernel, call, groups, has_own_keys=num_heads == num_kv_heads)
    if solver is JointSoftmax:
        return None
    is_whole = partial(
        is_as_whole,
        options.pattern,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        is_causal=options.is_causal,
    )
    if options.backend == triton.NAME:
        # Looked up for all parts, since all processes must come to the same end.
        for part in range(sequences.num_parts):
            if not all(map(is_whole, sequences.groups(part))):
                raise NotImplementedError(
                    "backend='triton' attends to parts that begin with the segments that lie in "
                    f"them, got parts of {sequences.part_length} tokens for {options.pattern}. "
                    "Use backend='auto', or parts of a multiple of the shorter segments."
                )
    elif not all(map(is_whole, problem.groups)):
        return None
    names = [field.name for field in fields(JointSoftmax)]
    own = {name: getattr(problem, name) for name in names}
    # The decay is applied before, by places in the whole sequence.
    own |= {"groups": groups, "kernel": kernel, "xpos_scale_base": None}
    return solver(**{**own, "out_dtype": torch.float32})


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_hidden: Tensor | None,
    lengths: Sequence[int],
    bounds: Sequence[int],
    group_name: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass: out, lse, and the rows and mask of other processes for the backward."""
    with torch.autocast(q.device.type, enabled=False):
        problem = _problem(q, k, is_hidden, lengths, bounds, group_name, Options(*options))
        out, lse = problem.forward(q, k, v)
    rows, mask = q.new_empty(0, 2 * q.shape[3]), q.new_empty(0, dtype=torch.bool)
    if problem.buffer:
        rows, *masks = problem.buffer
        mask = masks[0] if masks else mask
    return out, lse, rows, mask


def _fake_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_hidden: Tensor | None,
    lengths: Sequence[int],
    bounds: Sequence[int],
    group_name: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if any(isinstance(size, torch.SymInt) for size in (*q.shape, *lengths, *bounds)):
        # A graph for every length: how much travels is known when it runs.
        num_rows: int | torch.SymInt = torch.library.get_ctx().new_dynamic_size()
    else:
        regions = _regions(q, k, lengths, bounds, group_name, Options(*options))
        num_rows = regions[-1].stop if regions else 0
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:3], dtype=lse_dtype),
        q.new_empty(num_rows, 2 * q.shape[3]),
        q.new_empty(0 if is_hidden is None else num_rows, dtype=torch.bool),
    )


def _regions(
    q: Tensor,
    k: Tensor,
    lengths: Sequence[int],
    bounds: Sequence[int],
    group_name: str,
    options: Options,
) -> tuple[Region, ...]:
    """Lists what travels to this process."""
    group = group_named(group_name)
    return regions_of(
        _sequences(q, lengths, bounds, group).groups(group.rank()),
        options.pattern,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        is_causal=options.is_causal,
    )


def _differentiate(
    out_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    mask: Tensor,
    is_hidden: Tensor | None,
    lengths: Sequence[int],
    bounds: Sequence[int],
    group_name: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass: gradients of q, k, v and of the bias, empty without one."""
    op = Options(*options)
    out_grad = out_grad if out_grad.stride(-1) == 1 else out_grad.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        problem = _problem(
            q,
            k,
            is_hidden,
            lengths,
            bounds,
            group_name,
            op,
            is_backward=True,
            has_lse_grad=lse_grad is not None,
        )
        problem.buffer.extend([rows, mask])
        grads = problem.backward(out_grad, lse_grad, q, k, v, out, lse)
    return *grads[:3], q.new_empty(0) if grads[3] is None else grads[3]


def _fake_differentiate(
    out_grad: Tensor, lse_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = Options(*rest[_NUM_SAVED:]).distance_bias
    bias_grad = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, is_hidden, *ctx.split = inputs[:_NUM_OWN]
    options = Options(*inputs[_NUM_OWN:])
    ctx.options = options[5:]
    ctx.save_for_backward(q, k, v, *output, is_hidden, *options[:5])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, out_grad: Tensor | None, lse_grad: Tensor | None, *_: None) -> Any:
    *saved, is_hidden, dense, distance, padding, packing, seed = ctx.saved_tensors
    options = Options(dense, distance, padding, packing, seed, *ctx.options)
    if out_grad is None:
        out_grad = torch.zeros_like(saved[3])
    *grads, bias_grad = torch.ops.longnet_zoo.parallel_dilated_attention_backward(
        out_grad,
        lse_grad if options.return_lse else None,
        *saved,
        is_hidden,
        *ctx.split,
        *options,
    )
    bias_grads = (None, None if distance is None else bias_grad)
    return *grads, None, *(None for _ in ctx.split), *bias_grads, *(None,) * (len(options) - 2)


_SPLIT = "Tensor? is_hidden, int[] lengths, int[] bounds, str group_name"
_NUM_OWN = 7  # arguments before the options
_NUM_SAVED = 8  # of the backward op, between v and the options
_custom_op = torch.library.custom_op(
    "longnet_zoo::parallel_dilated_attention",
    _attend,
    mutates_args=(),
    schema=(
        f"(Tensor q, Tensor k, Tensor v, {_SPLIT}, {OPTIONS_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
_custom_op.register_fake(_fake_attend)
_custom_op.register_autograd(_chain, setup_context=_save)
_custom_backward = torch.library.custom_op(
    "longnet_zoo::parallel_dilated_attention_backward",
    _differentiate,
    mutates_args=(),
    schema=(
        "(Tensor out_grad, Tensor? lse_grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"Tensor rows, Tensor mask, {_SPLIT}, {OPTIONS_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
_custom_backward.register_fake(_fake_differentiate)
