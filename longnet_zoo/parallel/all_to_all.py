"""Attention over processes by exchanging heads for tokens (DeepSpeed-Ulysses, arXiv 2309.14509).

Every process gets some heads of the whole sequence, attends as one process does, and gives the
results back. For few processes and many heads: their number must divide that of the heads, and what
travels grows with the length of a part.

Shape legend: b batch, c tokens of a part, n tokens of all parts, p processes, h heads, d head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from longnet_zoo.ops.dilated_attention import DistanceBias, checked_options
from longnet_zoo.ops.pattern import DilatedPattern

from .collectives import swap_rows
from .layout import gather_rows
from .sequences import check_bias, check_bounds, check_mask

__all__ = ["all_to_all_attention", "check_num_heads"]


def all_to_all_attention(
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
) -> Any:
    """Attends to sequences of which each process has a part, some heads on each process.

    Arguments, results and errors are those of `parallel_dilated_attention`. Key heads that several
    processes need are sent to each of them.

    Raises:
        ValueError: If the number of processes does not divide that of the query heads.
    """
    group = mesh.get_group()
    check_num_heads(q.shape[2], group.size())
    check_bias(bias)
    num_heads = q.shape[2]
    q, k, v = _heads_of_process(q, k, v, group)
    heads = slice(group.rank() * q.shape[2], (group.rank() + 1) * q.shape[2])
    num_tokens, rest = q.shape[1], 0
    mask = _whole_mask(key_padding_mask, q, group)
    if cu_seqlens is not None:
        # What lies behind the last sequence is padding.
        last = check_bounds(cu_seqlens, q.shape[0], num_tokens)[-1]
        num_tokens, rest = last, num_tokens - last
    q, k, v = (x[:, :num_tokens].contiguous() for x in (q, k, v))
    options = checked_options(
        q,
        k,
        v,
        replace(pattern, first_head=heads.start, total_heads=num_heads),
        is_causal=is_causal,
        scale=scale,
        bias=None if bias is None else lambda distances: bias(distances)[heads],
        xpos_scale_base=xpos_scale_base,
        key_padding_mask=mask,
        cu_seqlens=cu_seqlens,
        dropout_p=dropout_p,
        backend=backend,
        return_lse=return_lse,
        # Processes whose generators are alike draw for other heads.
        seed=torch.randint(2**62, ()) + group.rank() if dropout_p else None,
    )
    out, lse = torch.ops.longnet_zoo.dilated_attention(q, k, v, *options)
    out = _part(pad(out, (0, 0, 0, 0, 0, rest)), group)
    if not return_lse:
        return out
    return out, _part(pad(lse, (0, 0, 0, rest), value=float("-inf")), group)


def check_num_heads(num_heads: int, num_parts: int) -> None:
    """Refuses a number of processes that does not divide the heads, naming the nearest that do."""
    if num_heads % num_parts:
        fitting = [size for size in range(1, num_heads + 1) if num_heads % size == 0]
        near = sorted(fitting, key=lambda size: abs(size - num_parts))[:2]
        raise ValueError(
            "method='all_to_all' needs a number of processes that divides the number of heads, got "
            f"{num_parts} processes and num_heads={num_heads}. Nearest: {min(near)} or {max(near)} "
            "processes; or use method='dilated', which takes any number."
        )


def _heads_of_process(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Some heads of the whole sequence, (b, n, h, d), from all heads of a part, in one exchange."""
    k, v = (_repeated(x, q.shape[2], group.size()) for x in (k, v))
    parts = torch.cat([_by_process(x, group.size()) for x in (q, k, v)], dim=3)
    return _whole(parts, group).split([x.shape[2] // group.size() for x in (q, k, v)], dim=2)


def _repeated(x: Tensor, num_heads: int, num_parts: int) -> Tensor:
    """Repeats key heads until each process has those of its query heads."""
    num_kv_heads = x.shape[2]
    copies = num_parts // gcd(num_parts, num_kv_heads)
    if num_heads % (num_kv_heads * copies):
        copies = num_heads // num_kv_heads
    return x if copies == 1 else x.repeat_interleave(copies, dim=2)


def _by_process(x: Tensor, num_parts: int) -> Tensor:
    return rearrange(x, "b c (p h) ... -> p b c h ...", p=num_parts)


def _whole(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Some heads of the whole sequence, (b, n, h, d), from all heads of a part, (p, b, c, h, d)."""
    return rearrange(swap_rows(x, group), "p b c h ... -> b (p c) h ...")


def _part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of a part, (b, c, p h, ...), from some heads of the whole, (b, n, h, ...)."""
    rows = rearrange(x, "b (p c) h ... -> p b c h ...", p=group.size())
    return rearrange(swap_rows(rows, group), "p b c h ... -> b c (p h) ...")


def _whole_mask(mask: Tensor | None, q: Tensor, group: dist.ProcessGroup) -> Tensor | None:
    if mask is None:
        return None
    batch, num_tokens = q.shape[:2]
    check_mask(mask, batch, num_tokens // group.size())
    parts = gather_rows(mask, group.group_name, group.size())
    return rearrange(parts, "(p b) c -> b (p c)", b=batch)
