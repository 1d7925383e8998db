"""Ring attention as a layer that stands alone: it can shard whole inputs by itself.

Shape legend: b batch, n seq_len, c rows of a rank, h heads, d head_dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longnet_zoo.ops.dilated_attention import DistanceBias
from longnet_zoo.ops.kernels import BACKENDS
from longnet_zoo.ops.positions import apply_rotary, rotary_tables

from .agreement import check_alike
from .gradients import with_mean_gradient
from .layout import (
    Layout,
    check_layout,
    gather_sequence,
    positions_of,
    shard_padding_mask,
    shard_sequence,
)
from .ring import ring_attention
from .sequences import check_whole_bounds

__all__ = ["RingAttention", "ring_mesh"]


class RingAttention(nn.Module):
    """Multi-head self-attention, exact, of a sequence that a ring of processes shares.

    Without a process group it computes alone. Every rank computes the same loss of all outputs; the
    gradient of a parameter is then the mean over the ranks of what each of them finds, as DDP and
    FSDP2 take it.

    Args:
        dim: Channels in and out.
        heads: Number of query heads.
        dim_head: Channels of a head; None: dim / heads.
        num_kv_heads: Number of key and value heads, a divisor of `heads`; None: `heads`.
        is_causal: Whether a query sees no later key.
        layout: Which rank holds which rows.
        auto_shard_seq: Whether inputs and outputs are whole sequences, the same on every rank of a
            ring; else they are the parts of each rank.
        ring_size: Ranks that share a sequence; None: all of the mesh. Several rings attend to
            sequences of their own.
        max_lookback: How many keys a query sees at most, itself included; causal only.
        rotary: Whether queries and keys turn by their positions (arXiv 2104.09864).
        rotary_base: Ratio of the longest to the shortest wavelength.
        dropout: Dropout of the attention weights in training, in [0, 1).
        bias: Whether the projections have a bias.
        backend: Kernel of the blocks; `"auto"` takes the fastest that serves.
        mesh: The ranks, one dimension; None: all processes, if there is a process group.

    Raises:
        ValueError: If sizes do not divide, or an option is outside its range.

    Example:
        >>> attention = RingAttention(512, 8, layout="striped")
        >>> out = attention(torch.randn(1, 100_000, 512))  # the same call on every rank
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dim_head: int | None = None,
        num_kv_heads: int | None = None,
        is_causal: bool = True,
        layout: Layout = "contiguous",
        auto_shard_seq: bool = True,
        ring_size: int | None = None,
        max_lookback: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        bias: bool = False,
        backend: str = "auto",
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = heads if num_kv_heads is None else num_kv_heads
        _check_sizes(dim, heads, dim_head, num_kv_heads)
        dim_head = dim // heads if dim_head is None else dim_head
        check_layout(layout)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if max_lookback is not None and (max_lookback < 1 or not is_causal):
            raise ValueError(
                "max_lookback must be at least 1 and attention causal, got "
                f"{max_lookback=} and {is_causal=}."
            )
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
        if rotary:
            rotary_tables(torch.zeros(1), dim_head, base=rotary_base)  # bad arguments fail here
        self.dim = dim
        self.heads = heads
        self.dim_head = dim_head
        self.num_kv_heads = num_kv_heads
        self.is_causal = is_causal
        self.layout: Layout = layout
        self.auto_shard_seq = auto_shard_seq
        self.max_lookback = max_lookback
        self.rotary_base = rotary_base if rotary else None
        self.dropout = dropout
        self.backend = backend
        self.mesh = ring_mesh(mesh, ring_size)
        self.q_proj = nn.Linear(dim, heads * dim_head, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * dim_head, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * dim_head, bias=bias)
        self.out_proj = nn.Linear(heads * dim_head, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        position_bias: DistanceBias | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attends within a batch of sequences.

        Args:
            x: Input, (batch, seq_len, dim), or with `auto_shard_seq=False` this rank's part of it,
                (batch, c, dim).
            position_bias: Added to the logits by distance, such as ALiBi; see `ring_attention`.
            key_padding_mask: Bool, (batch, seq_len) or of this rank's part, True = padding.
            cu_seqlens: Bounds of packed sequences in the whole row, int32, for batch 1.

        Returns:
            Output, shaped as `x`.

        Raises:
            ValueError: If `x` has another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must be (batch, seq_len, dim) with dim={self.dim}, got {tuple(x.shape)}."
            )
        if self.mesh is not None:
            check_alike(
                x,
                self.mesh.get_group(),
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
            )
        if not self.auto_shard_seq or self.mesh is None:
            return self._attend(x, position_bias, key_padding_mask, cu_seqlens)
        batch, seq_len, _ = x.shape
        if cu_seqlens is None:
            key_padding_mask = shard_padding_mask(
                key_padding_mask, seq_len, batch, self.mesh, self.layout
            )
        else:
            check_whole_bounds(cu_seqlens, batch, seq_len, key_padding_mask)
        # What comes before is the same on all ranks, and so must its gradient be.
        x = with_mean_gradient(x, self.mesh.get_group())
        part = shard_sequence(x, self.mesh, layout=self.layout)
        part = self._attend(part, position_bias, key_padding_mask, cu_seqlens)
        return gather_sequence(part, self.mesh, layout=self.layout, seq_len=seq_len)

    def extra_repr(self) -> str:
        """Lists the options."""
        size = 1 if self.mesh is None else self.mesh.size()
        return (
            f"dim={self.dim}, heads={self.heads}, dim_head={self.dim_head}, "
            f"num_kv_heads={self.num_kv_heads}, is_causal={self.is_causal}, "
            f"layout={self.layout!r}, auto_shard_seq={self.auto_shard_seq}, ring_size={size}, "
            f"max_lookback={self.max_lookback}, rotary_base={self.rotary_base}, "
            f"dropout={self.dropout}, backend={self.backend!r}"
        )

    def _attend(
        self,
        x: Tensor,
        position_bias: DistanceBias | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b c (h d) -> b c h d", h=num_heads)
            for project, num_heads in (
                (self.q_proj, self.heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        if self.rotary_base is not None:
            # The stride of a stripe is the size of this ring, however many processes there are.
            rank, size = 0, 1
            if self.mesh is not None:
                rank, size = self.mesh.get_local_rank(), self.mesh.size()
            layout: Layout = "contiguous" if self.mesh is None else self.layout
            positions = positions_of(rank, size, x.shape[1], layout, device=x.device)
            tables = rotary_tables(positions, self.dim_head, base=self.rotary_base)
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        out = ring_attention(
            q,
            k,
            v,
            self.mesh,
            is_causal=self.is_causal,
            bias=position_bias,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
            layout="contiguous" if self.mesh is None else self.layout,
            max_lookback=self.max_lookback,
            backend=self.backend,
        )
        return self.out_proj(rearrange(out, "b c h d -> b c (h d)"))


def ring_mesh(mesh: DeviceMesh | None, ring_size: int | None) -> DeviceMesh | None:
    """Cuts the ranks of a mesh into rings of neighbours; all ranks must call it.

    Args:
        mesh: One dimension; None: all processes, if there is a process group.
        ring_size: Ranks of a ring; None: all of the mesh.

    Returns:
        The mesh of this rank's ring; None without a process group.

    Raises:
        ValueError: If `ring_size` does not divide the ranks, or the mesh that is to be cut is not
            the whole world.
    """
    if mesh is None and not dist.is_initialized():
        if ring_size not in (None, 1):
            raise ValueError(
                f"ring_size={ring_size} needs that many processes, and there is no process group. "
                "Start them with torchrun and call torch.distributed.init_process_group first."
            )
        return None
    if mesh is None:
        accelerator = torch.accelerator.current_accelerator()
        has_gpus = accelerator is not None and dist.get_backend() != "gloo"
        device_type = accelerator.type if accelerator is not None and has_gpus else "cpu"
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh}. Name the one that is to be the ring."
        )
    size = mesh.size()
    if ring_size is None or ring_size == size:
        return mesh
    divisors = [x for x in range(1, size + 1) if size % x == 0]
    if ring_size not in divisors:
        nearest = max((x for x in divisors if x < ring_size), default=1)
        above = min((x for x in divisors if x > ring_size), default=size)
        raise ValueError(
            f"ring_size must divide the {size} ranks, got ring_size={ring_size}. Use "
            f"{' or '.join(map(str, sorted({nearest, above})))}."
        )
    if size != dist.get_world_size():
        raise ValueError(
            f"ring_size={ring_size} cuts a mesh of {size} ranks, which must then be all "
            f"{dist.get_world_size()} processes. Make a mesh with one more dimension of size "
            f"{ring_size} and pass that."
        )
    rings = DeviceMesh(
        mesh.device_type, mesh.mesh.view(-1, ring_size), mesh_dim_names=("rings", "ring")
    )
    return rings["ring"]


def _check_sizes(dim: int, heads: int, dim_head: int | None, num_kv_heads: int) -> None:
    if heads < 1 or dim < 1 or (dim_head is None and dim % heads):
        raise ValueError(
            f"dim must be a positive multiple of heads, got dim={dim} and heads={heads}. "
            "Or pass dim_head."
        )
    if dim_head is not None and dim_head < 1:
        raise ValueError(f"dim_head must be at least 1, got {dim_head}.")
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ValueError(
            "heads must be a multiple of num_kv_heads, got "
            f"heads={heads} and num_kv_heads={num_kv_heads}."
        )
