"""Exact attention of sequences that are split over a ring of processes (arXiv 2310.01889).

Keys and values pass from rank to rank while the ranks compute; only what is seen further on
travels. Rows are laid out contiguously, in stripes (arXiv 2311.09431) or in a zigzag.

Shape legend: b batch, c rows of a rank, h num_heads, d head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longnet_zoo.ops.custom_op import OPTIONS_SCHEMA, Options
from longnet_zoo.ops.dilated_attention import DistanceBias, checked_options
from longnet_zoo.ops.kernels import choose_kernel
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import check_xpos_range, float64_device, xpos_zeta

from .band import Sight
from .collectives import group_named
from .layout import Layout, gather_rows, positions_of, runs_of
from .ring_softmax import RingSoftmax, Span
from .sequences import check_bias, check_bounds

__all__ = ["ring_attention"]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    bias: DistanceBias | None = None,
    xpos_scale_base: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    layout: Layout = "contiguous",
    max_lookback: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attends to whole sequences of which each rank of a mesh has a part.

    All ranks call it with the same options. Parts are as `shard_sequence` makes them, equally long
    on all ranks. A row that sees no key, and padding, gives zeros and an LSE of -inf.

    Args:
        q: Queries of this rank, (batch, c, num_heads, head_dim).
        k: Its keys, (batch, c, num_kv_heads, head_dim); num_kv_heads divides num_heads.
        v: Its values, like k.
        mesh: The ranks that share the sequence, one dimension; None: this process by itself.
        is_causal: Whether a query sees only the keys up to itself.
        scale: Factor on the dot products; 1 / sqrt(head_dim) if None.
        bias: Added to the logits: a function of int64 distances (key position minus query
            position), (m,), that returns (num_heads, m), such as ALiBi. Gradients flow to it.
        xpos_scale_base: Base of xPos's decay, as for `dilated_attention`.
        key_padding_mask: Bool, (batch, c), True at padding; None on all ranks or on none. Padding
            at the end of the whole sequence costs nothing.
        cu_seqlens: int32, (num_sequences + 1,), with batch 1: bounds of sequences packed in the
            whole row, each attended by itself; what lies behind the last is padding.
        dropout_p: Probability of dropping an attention weight, in [0, 1); ranks draw their own.
        layout: Which rank holds which rows.
        max_lookback: How many keys a query sees at most, itself included; causal only. Keys
            travel no further than they are seen.
        backend: `"auto"`, or a name of `ops.kernels.BACKENDS`, as for `dilated_attention`.
        return_lse: Whether to return the log-sum-exp as well.

    Returns:
        The output of this rank's queries, shape and dtype of q; with `return_lse` also the LSE,
        (batch, c, num_heads), float32 (float64 for float64 input).

    Raises:
        ValueError: If shapes, dtypes or values do not fit, with the values.
        TypeError: If an argument is of the wrong kind.
        NotImplementedError: If `bias` is a tensor, or a named backend cannot serve the call.
        RuntimeError: If the package of a named backend is absent or broken.

    Example:
        >>> part = [shard_sequence(x, mesh, layout="zigzag") for x in (q, k, v)]
        >>> out = ring_attention(*part, mesh, is_causal=True, layout="zigzag")
    """
    _check(bias, is_causal, max_lookback)
    rank, size = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
    seq_len = q.shape[1] * size
    runs_of(rank, size, q.shape[1], layout)  # refuses rows that cannot be of this layout
    # Kernels also evaluate the bias of pairs that they then hide, up to twice as far.
    span = seq_len if max_lookback is None else min(seq_len, 2 * max_lookback)
    options = checked_options(
        q,
        k,
        v,
        DilatedPattern(segment_lengths=(span,), dilation_rates=(1,)),
        is_causal=is_causal,
        scale=scale,
        bias=bias,
        xpos_scale_base=None,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        dropout_p=dropout_p,
        backend=backend,
        return_lse=return_lse,
        seed=torch.randint(2**62, (), dtype=torch.int64) if dropout_p else None,
        seq_len=seq_len,
    )
    if xpos_scale_base is not None:
        positions = positions_of(rank, size, q.shape[1], layout, device=q.device)
        bounds: tuple[int, ...] = (0, seq_len)
        if cu_seqlens is not None:
            bounds = check_bounds(cu_seqlens, q.shape[0], seq_len)
        q, k = _decayed(q, k, positions, bounds, xpos_scale_base, is_causal=is_causal)
    out, lse = torch.ops.longnet_zoo.ring_attention(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)),
        "" if mesh is None else mesh.get_group().group_name,
        layout,
        max_lookback,
        *options,
    )
    return (out, lse) if return_lse else out


def _check(bias: DistanceBias | None, is_causal: bool, max_lookback: int | None) -> None:
    check_bias(bias)
    if max_lookback is not None and (max_lookback < 1 or not is_causal):
        raise ValueError(
            "max_lookback counts the keys up to the query's own, so it must be at least 1 and "
            f"attention causal, got {max_lookback=} and {is_causal=}."
        )


def _decayed(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    bounds: tuple[int, ...],
    scale_base: float,
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Multiplies by xPos's factors, which count from the middle of each sequence."""
    span, head_dim = max(stop - start for start, stop in pairwise(bounds)), q.shape[-1]
    check_xpos_range(
        span=span, head_dim=head_dim, scale_base=scale_base, is_causal=is_causal, dtype=q.dtype
    )
    device = float64_device(q.device)
    edges = torch.tensor(bounds, dtype=torch.float64, device=device)
    middles = torch.cat([(edges[1:] + edges[:-1] - 1) / 2, edges[-1:]])  # padding comes last
    places = positions.to(device, torch.float64)
    places = places - middles[torch.searchsorted(edges[1:], places, right=True)]
    log_zeta = xpos_zeta(head_dim, device=device).log()
    factors = torch.exp(places[:, None] / scale_base * log_zeta)
    factors = factors.to(torch.promote_types(q.dtype, torch.float32))
    factors = factors.repeat_interleave(2, dim=1).unsqueeze(1).to(q.device)
    return (q * factors).to(q.dtype), (k / factors).to(k.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_name: str,
    layout: Layout,
    max_lookback: int | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The forward pass; options as in `Options`."""
    with torch.autocast(q.device.type, enabled=False):
        problem = _problem(q, group_name, layout, max_lookback, Options(*options))
        return problem.forward(q, k, v)


def _fake_attend(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _differentiate(
    out_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group_name: str,
    layout: Layout,
    max_lookback: int | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass: gradients of q, k, v and of the bias, empty without one."""
    out_grad = out_grad if out_grad.stride(-1) == 1 else out_grad.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        problem = _problem(
            q,
            group_name,
            layout,
            max_lookback,
            Options(*options),
            is_backward=True,
            has_lse_grad=lse_grad is not None,
        )
        grads = problem.backward(out_grad, lse_grad, q, k, v, out, lse)
    return *grads[:3], q.new_empty(0) if grads[3] is None else grads[3]


def _fake_differentiate(
    out_grad: Tensor, lse_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = Options(*rest[5:]).distance_bias
    bias_grad = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias_grad


def _problem(
    q: Tensor,
    group_name: str,
    layout: Layout,
    max_lookback: int | None,
    options: Options,
    **direction: bool,
) -> RingSoftmax:
    """Finds the sequences and the kernel of a call."""
    group = group_named(group_name) if group_name else None
    if group is not None:
        _introduce(group, q.device)
    spans, is_hidden = _find_spans(q, options, group, layout)
    call = options.call(q, has_hidden_keys=is_hidden is not None, **direction)
    seed = 0 if options.seed is None else int(options.seed)
    return RingSoftmax(
        kernel=choose_kernel(options.backend, replace(call, is_block=True)),
        group=group,
        layout=layout,
        sight=Sight(is_causal=options.is_causal, max_lookback=max_lookback),
        spans=spans,
        scale=options.scale,
        is_hidden=is_hidden,
        distance_bias=options.distance_bias,
        dropout_p=options.dropout_p,
        # Ranks whose generators are in the same state draw different numbers.
        seed=hash((seed, 0 if group is None else group.rank())),
    )


# Groups whose ranks have all met: NCCL wants that before some of them exchange messages.
_INTRODUCED: WeakSet[dist.ProcessGroup] = WeakSet()


def _introduce(group: dist.ProcessGroup, device: torch.device) -> None:
    if group not in _INTRODUCED:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _INTRODUCED.add(group)


def _find_spans(
    q: Tensor, options: Options, group: dist.ProcessGroup | None, layout: Layout
) -> tuple[tuple[Span, ...], Tensor | None]:
    """Finds where the sequences lie, and the mask where padding is not only at their ends."""
    batch, length = q.shape[:2]
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if options.cu_seqlens is not None:
        bounds = check_bounds(options.cu_seqlens, batch, size * length)
        return tuple(Span(0, 1, pair) for pair in pairwise(bounds)), None
    lengths, is_hidden = [size * length] * batch, options.key_padding_mask
    if is_hidden is not None:
        positions = positions_of(rank, size, length, layout, device=q.device)
        stops = (positions + 1).masked_fill(is_hidden, 0).amax(1)
        mine = torch.stack(((~is_hidden).sum(1), stops))
        parts = mine[None] if group is None else gather_rows(mine[None], group.group_name, size)
        num_real, stops = parts[:, 0].sum(0), parts[:, 1].amax(0)
        if torch.equal(num_real, stops):
            lengths, is_hidden = num_real.tolist(), None
    spans, first = [], 0
    for seq_len, equals in groupby(lengths):
        stop = first + len(list(equals))
        if seq_len:
            spans.append(Span(first, stop, (0, seq_len)))
        first = stop
    return tuple(spans), is_hidden


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    options = Options(*inputs[6:])
    ctx.ring, ctx.options = inputs[3:6], options[5:]
    ctx.save_for_backward(*inputs[:3], *output, *options[:5])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, out_grad: Tensor | None, lse_grad: Tensor | None) -> Any:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = Options(*tensors, *ctx.options)
    *grads, bias_grad = torch.ops.longnet_zoo.ring_attention_backward(
        torch.zeros_like(out) if out_grad is None else out_grad,
        lse_grad if options.return_lse else None,
        *(q, k, v, out, lse, *ctx.ring, *options),
    )
    bias_grads = (None, None if options.distance_bias is None else bias_grad)
    return *grads, *(None,) * 3, *bias_grads, *(None,) * (len(options) - 2)


_RING_SCHEMA = f"str group_name, str layout, int? max_lookback, {OPTIONS_SCHEMA}"
_custom_op = torch.library.custom_op(
    "longnet_zoo::ring_attention",
    _attend,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_RING_SCHEMA}) -> (Tensor, Tensor)",
)
_custom_op.register_fake(_fake_attend)
_custom_op.register_autograd(_chain, setup_context=_save)
_custom_backward = torch.library.custom_op(
    "longnet_zoo::ring_attention_backward",
    _differentiate,
    mutates_args=(),
    schema=(
        "(Tensor out_grad, Tensor? lse_grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_RING_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
_custom_backward.register_fake(_fake_differentiate)
