"""Which rank holds which tokens of a sequence, and tensors cut and joined accordingly.

A sequence of n tokens is padded at its end to W * C positions; each of the W ranks holds C rows:

- contiguous: rank p holds positions p * C to (p + 1) * C - 1;
- striped (arXiv 2311.09431): rank p holds positions p, p + W, p + 2 * W, ...;
- zigzag: of 2 * W chunks rank p holds chunks p and 2 * W - 1 - p.

The last two give every rank of a causal ring about as much work.

Shape legend: b batch, n seq_len, c rows of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

__all__ = [
    "Layout",
    "Run",
    "check_layout",
    "gather_rows",
    "gather_sequence",
    "join_rows",
    "part_length",
    "positions_of",
    "runs_of",
    "shard_padding_mask",
    "shard_sequence",
    "shard_text",
]

# Their names in `torch.distributed` change with its versions.
_ops = torch.ops._c10d_functional

Layout = Literal["contiguous", "striped", "zigzag"]


@dataclass(frozen=True)
class Run:
    """Rows at evenly spaced positions: start, start + step, ..., `count` of them."""

    start: int
    step: int
    count: int

    @property
    def stop(self) -> int:
        """The position after the last one, a step further."""
        return self.start + self.step * self.count


def part_length(seq_len: int, world_size: int, layout: Layout = "contiguous") -> int:
    """Rows that each rank holds of a sequence, padding included.

    Raises:
        ValueError: If `seq_len` or `world_size` is below 1, or `layout` is unknown.
    """
    check_layout(layout)
    if seq_len < 1 or world_size < 1:
        raise ValueError(
            "seq_len and world_size must be at least 1, got "
            f"seq_len={seq_len} and world_size={world_size}."
        )
    chunks = 2 if layout == "zigzag" else 1
    return chunks * -(-seq_len // (chunks * world_size))


def runs_of(rank: int, world_size: int, length: int, layout: Layout) -> tuple[Run, ...]:
    """Positions of a rank's rows, in the order in which it holds them.

    Args:
        rank: Place in the group that holds the sequence.
        world_size: Ranks of that group.
        length: Rows that each rank holds, padding included.
        layout: Who holds what.

    Raises:
        ValueError: If `rank` or `layout` is none, or zigzag rows do not split in two chunks.
    """
    check_layout(layout)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got {rank=} and {world_size=}.")
    if layout == "contiguous":
        return (Run(rank * length, 1, length),)
    if layout == "striped":
        return (Run(rank, world_size, length),)
    if length % 2:
        raise ValueError(
            f"layout 'zigzag' needs an even number of rows on each rank, got {length}. Pad the "
            f"sequence to a multiple of 2 * world_size = {2 * world_size} tokens."
        )
    chunk = length // 2
    return Run(rank * chunk, 1, chunk), Run((2 * world_size - 1 - rank) * chunk, 1, chunk)


def positions_of(
    rank: int,
    world_size: int,
    length: int,
    layout: Layout = "contiguous",
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Positions of a rank's rows, int64 (length,); arguments and errors are those of `runs_of`."""
    return torch.cat(
        [
            torch.arange(run.start, run.stop, run.step, device=device)
            for run in runs_of(rank, world_size, length, layout)
        ]
    )


def check_layout(layout: str) -> None:
    """Raises ValueError if a layout is unknown."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}.")


def shard_sequence(
    x: Tensor,
    mesh: DeviceMesh,
    *,
    dim: int = 1,
    layout: Layout = "contiguous",
    pad_value: float = 0,
) -> Tensor:
    """Takes this rank's rows of a whole tensor, filled up to the same number on every rank.

    The gradient of `x` is zero in the rows of other ranks.

    Args:
        x: The same tensor on every rank, any dtype.
        mesh: The ranks that share the sequence, one dimension.
        dim: Dimension of the sequence.
        layout: Which rank holds which rows.
        pad_value: What fills rows beyond the sequence.

    Returns:
        The rows of this rank, `part_length(...)` of them in `dim`.

    Example:
        >>> part = shard_sequence(torch.randn(2, 1000, 64), mesh)  # (2, 250, 64) on 4 ranks
    """
    world_size = mesh.size()
    length = part_length(x.shape[dim], world_size, layout)
    x = x.movedim(dim, 0)
    rows = []
    for run in runs_of(mesh.get_local_rank(), world_size, length, layout):
        part = x[run.start : run.stop : run.step]
        missing = run.count - part.shape[0]
        if missing:
            part = pad(part, (*[0] * (2 * part.ndim - 1), missing), value=pad_value)
        rows.append(part)
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).movedim(0, dim)


def gather_sequence(
    x: Tensor,
    mesh: DeviceMesh,
    *,
    dim: int = 1,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
) -> Tensor:
    """Joins the rows of all ranks into the whole tensor on every rank.

    The gradient of `x` is the sum over the ranks of their gradients of its rows, added in at least
    float32.

    Args:
        x: The rows of this rank, equally many on every rank; any dtype.
        mesh: The ranks that share the sequence, one dimension.
        dim: Dimension of the sequence.
        layout: Which rank holds which rows.
        seq_len: Length of the sequence without its padding; None keeps the padding.

    Returns:
        The whole tensor, `seq_len` long in `dim`.

    Raises:
        ValueError: If `seq_len` does not fit the rows of the ranks.
    """
    length, world_size = x.shape[dim], mesh.size()
    runs_of(0, world_size, length, layout)  # refuses rows that cannot be of this layout
    if seq_len is None:
        seq_len = length * world_size
    elif part_length(seq_len, world_size, layout) != length:
        raise ValueError(
            f"seq_len={seq_len} needs parts of {part_length(seq_len, world_size, layout)} rows on "
            f"{world_size} ranks, got {length} rows. Pass what shard_sequence made, and its length."
        )
    x = join_rows(x.movedim(dim, 0), mesh.get_group().group_name, world_size)
    if layout == "striped":
        x = x.unflatten(0, (world_size, length)).transpose(0, 1).flatten(0, 1)
    elif layout == "zigzag":
        early, late = x.unflatten(0, (world_size, 2, length // 2)).unbind(1)
        x = torch.cat([early, late.flip(0)]).flatten(0, 1)
    return x[:seq_len].movedim(0, dim)


def join_rows(x: Tensor, group_name: str, world_size: int) -> Tensor:
    """Joins equally many rows of each rank of a group; the gradient is as for `gather_sequence`."""
    return _Gather.apply(x, group_name, world_size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, world_size: int) -> Tensor:
        ctx.group, ctx.world_size = group, world_size
        return gather_rows(x, group, world_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        mine = _ops.reduce_scatter_tensor(total, "sum", ctx.world_size, ctx.group)
        return _ops.wait_tensor(mine).to(grad.dtype), None, None


def gather_rows(x: Tensor, group_name: str, world_size: int) -> Tensor:
    """Joins tensors of all ranks of a group in their first dimension; without a gradient."""
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), world_size, group_name))


def shard_padding_mask(
    mask: Tensor | None,
    seq_len: int,
    batch: int,
    mesh: DeviceMesh,
    layout: Layout = "contiguous",
) -> Tensor | None:
    """Takes this rank's part of a padding mask, with the padding that `shard_sequence` adds.

    Args:
        mask: The same bool tensor on every rank, (batch, seq_len), True at padding; or None.
        seq_len: Length of the sequence.
        batch: Sequences of the batch.
        mesh: The ranks that share the sequence, one dimension.
        layout: Which rank holds which rows.

    Returns:
        Bool, (batch, rows of this rank); None on all ranks if none of them holds padding.

    Raises:
        ValueError: If `mask` is not bool (batch, seq_len).
    """
    is_filled = part_length(seq_len, mesh.size(), layout) * mesh.size() > seq_len
    if mask is None:
        if not is_filled:
            return None
        mask = torch.zeros(batch, seq_len, dtype=torch.bool, device=mesh.device_type)
    if mask.dtype != torch.bool or mask.shape != (batch, seq_len):
        raise ValueError(
            f"mask must be bool of the shape (batch, seq_len) = {(batch, seq_len)}, got "
            f"{mask.dtype} {tuple(mask.shape)}. True stands for padding."
        )
    if not is_filled and not mask.any():
        return None
    return shard_sequence(mask, mesh, layout=layout, pad_value=True)


def shard_text(
    tokens: Tensor, mesh: DeviceMesh, *, layout: Layout = "contiguous", ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Makes this rank's inputs and next-token labels; a label may lie on the next rank.

    Args:
        tokens: The same token ids on every rank, (batch, seq_len + 1).
        mesh: The ranks that share the sequence, one dimension.
        layout: Which rank holds which rows.
        ignore_index: Label of the padding.

    Returns:
        Token ids, padded with 0, and labels, padded with `ignore_index`; each (batch, rows).

    Raises:
        ValueError: If `tokens` is not (batch, 2 or more).
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            "tokens must have the shape (batch, seq_len + 1), one more than there are labels, got "
            f"{tuple(tokens.shape)}."
        )
    return (
        shard_sequence(tokens[:, :-1], mesh, layout=layout),
        shard_sequence(tokens[:, 1:], mesh, layout=layout, pad_value=ignore_index),
    )
