"""Decoding with keys that are spread over ranks: every rank has the query, each some keys.

Each rank attends to its own keys; two reductions join the results, whatever the number of ranks
(tree attention, arXiv 2408.04093): the maximum of the LSEs, then sums weighted by them.

Shape legend: b batch, t queries, c keys of a rank, h heads, g key heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longnet_zoo.ops.kernels import Call, capability_of, choose_kernel
from longnet_zoo.ops.kernels.bias import LogitBias
from longnet_zoo.ops.kernels.call import BlockOptions

__all__ = ["tree_attention"]


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh | None,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attends with the same queries on all ranks to the keys of all ranks.

    Every query sees every key: that of a new token sees all before it. It has no gradient.

    Args:
        q: Queries, the same on every rank, (batch, num_queries, num_heads, head_dim); one query
            when a token is decoded.
        k: Keys of this rank, (batch, c, num_kv_heads, head_dim); num_kv_heads divides num_heads.
            Ranks may have different numbers of them, or none.
        v: Their values, like k.
        mesh: The ranks, one dimension; None: this process by itself.
        scale: Factor on the dot products; 1 / sqrt(head_dim) if None.
        key_padding_mask: Bool, (batch, c), True at keys of this rank that no query sees.
        return_lse: Whether to return the log-sum-exp as well.

    Returns:
        The output, shape and dtype of q, the same on every rank; with `return_lse` also the LSE,
        (batch, num_queries, num_heads), float32 (float64 for float64 input). Without any key zeros
        and -inf.

    Raises:
        ValueError: If shapes do not fit.
        TypeError: If dtypes differ.
        NotImplementedError: If a gradient is asked for.

    Example:
        >>> out = tree_attention(q, cached_keys, cached_values, mesh)  # q (1, 1, 8, 64)
    """
    _check(q, k, v, key_padding_mask)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = _attend(q, k, v, scale, key_padding_mask)
    if mesh is not None and mesh.size() > 1:
        out, lse = _joined(out, lse, mesh.get_group())
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError(
            "tree_attention has no gradient, got inputs that require one. Decode under "
            "torch.no_grad(), and train with ring_attention."
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    is_fitting = q.ndim == k.ndim == 4 and k.shape == v.shape
    if not is_fitting or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "q must be (batch, num_queries, num_heads, head_dim), k and v (batch, keys, "
            f"num_kv_heads, head_dim), got q {tuple(q.shape)}, k {tuple(k.shape)} and v "
            f"{tuple(v.shape)}."
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key heads, "
            f"got {q.shape[2]} and {k.shape[2]}."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise ValueError(
            f"key_padding_mask must be bool (batch, keys) = {tuple(k.shape[:2])}, got {mask.dtype} "
            f"{tuple(mask.shape)}."
        )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attends to the keys of this rank: out and lse, at least float32."""
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1] == 0:
        out = q.new_zeros(q.shape, dtype=sum_dtype)
        return out, out.new_full(q.shape[:3], float("-inf"))
    call = Call(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        capability=capability_of(q.device),
        has_hidden_keys=mask is not None,
        is_block=True,
    )
    bias = None
    if mask is not None:
        bias = LogitBias(row_step=1, is_hidden=mask.unsqueeze(-1))
        k, v = (x.masked_fill(mask[:, :, None, None], 0.0) for x in (k, v))  # NaNs included
    # The queries of a group of heads become rows that see the same keys: nothing is repeated.
    num_groups = k.shape[2]
    rows = q.unflatten(2, (num_groups, -1)).transpose(2, 3).flatten(1, 2)
    options = BlockOptions(scale=scale, is_causal=False, bias=bias)
    out, lse = choose_kernel("auto", call).forward(rows, k, v, options)
    shape = (q.shape[1], q.shape[2] // num_groups)
    out = out.unflatten(1, shape).transpose(2, 3).flatten(2, 3)
    return out.to(sum_dtype), lse.unflatten(1, shape).transpose(2, 3).flatten(2, 3)


def _joined(out: Tensor, lse: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Joins the results of all ranks."""
    largest = lse.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    weights = torch.exp(lse - largest.masked_fill(largest == float("-inf"), 0.0)).unsqueeze(-1)
    sums = torch.cat((out * weights, weights), dim=-1)
    dist.all_reduce(sums, group=group)
    total = sums[..., -1:]
    # Where no rank has a key, sum and total are zero.
    return sums[..., :-1] / total.masked_fill(total == 0, 1.0), total.squeeze(-1).log() + largest
