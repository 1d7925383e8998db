"""Dilated self-attention as a layer: projections, positions, the op, the output projection.

Shape legend: b batch, n seq_len, h num_heads (or num_kv_heads), d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from longnet_zoo.ops.branches import ConfiguredBranch, make_branches
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.kernels import BACKENDS
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import apply_rotary

from .multiway import Route, make_multiway, run_routed
from .positions import AlibiBias, RelativeBias, RotaryEmbedding

__all__ = [
    "AttentionOp",
    "DilatedAttention",
    "Position",
    "check_attention_options",
    "check_branch_options",
    "make_position_bias",
    "make_rotary",
]

Position = Literal["xpos", "rotary", "alibi", "relative"]
# Has the signature of `dilated_attention`.
AttentionOp = Callable[..., Tensor]


class DilatedAttention(nn.Module):
    """Multi-head dilated self-attention (LongNet, arXiv 2307.02486) with its projections.

    Weights start at PyTorch's defaults; `TransformerStack` or `initialize_weights` sets the gains.
    The op is the attribute `attention_op`, with the signature of `dilated_attention`: replace it to
    run another schedule, e.g. over several processes.

    Args:
        embed_dim: Channels in and out, a multiple of `num_heads`.
        num_heads: Number of query heads.
        pattern: Segment lengths and dilation rates.
        is_causal: Whether a query sees no later key.
        num_kv_heads: Number of key and value heads, a divisor of `num_heads`; None: `num_heads`,
            1: multi-query attention.
        position: `"xpos"`, `"rotary"`, `"alibi"`, `"relative"` (T5) or None.
        rotary_base: Ratio of the longest to the shortest wavelength, for `"xpos"` and `"rotary"`.
        xpos_scale_base: Scale base in positions, for `"xpos"`.
        relative_buckets: Number of distance buckets, for `"relative"`.
        relative_max_distance: Distance from which on all share a bucket, for `"relative"`.
        qk_norm: Whether queries and keys pass a LayerNorm over head_dim, one of its own for each,
            shared by the heads and before the rotation (arXiv 2302.05442).
        sub_ln: Whether a LayerNorm over embed_dim comes before `out_proj` (Magneto,
            arXiv 2210.06423).
        bias: Whether the projections have a bias.
        dropout: Dropout of the attention weights in training, in [0, 1).
        eps: Epsilon of the LayerNorms.
        backend: Kernel of the op; `"auto"` takes the fastest that serves.
        num_modalities: Number of modalities with projections and norms of their own.
        extra_branches: Branches beside those of the pattern, `BigBirdBlocks` or `HashBuckets`; only
            for `position="rotary"` or None, and without dropout.

    Raises:
        ValueError: If sizes do not divide, or an option is outside its range.
        TypeError: If `pattern` is not a `DilatedPattern`, or a branch no branch.
        NotImplementedError: If extra branches come with what they do not serve.

    Example:
        >>> pattern = DilatedPattern.geometric(64, 256)
        >>> attention = DilatedAttention(embed_dim=64, num_heads=4, pattern=pattern)
        >>> out = attention(torch.randn(2, 1000, 64))
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        pattern: DilatedPattern,
        is_causal: bool = False,
        num_kv_heads: int | None = None,
        position: Position | None = "xpos",
        rotary_base: float = 10000.0,
        xpos_scale_base: float = 512.0,
        relative_buckets: int = 32,
        relative_max_distance: int = 128,
        qk_norm: bool = False,
        sub_ln: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
        backend: str = "auto",
        num_modalities: int = 1,
        extra_branches: Sequence[ConfiguredBranch] = (),
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_attention_options(embed_dim, num_heads, num_kv_heads, pattern, dropout, backend)
        if position is not None and position not in get_args(Position):
            raise ValueError(
                f"position must be None or one of {get_args(Position)}, got {position!r}."
            )
        if position == "xpos" and not xpos_scale_base > 0.0:
            raise ValueError(f"xpos_scale_base must be positive, got {xpos_scale_base}.")
        self.extra_branches = make_branches(extra_branches)
        check_branch_options(self.extra_branches, position, dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.pattern = pattern
        self.is_causal = is_causal
        self.position = position
        self.xpos_scale_base = xpos_scale_base if position == "xpos" else None
        self.dropout = dropout
        self.backend = backend
        self.attention_op = dilated_attention

        kv_dim = num_kv_heads * self.head_dim
        project = partial(nn.Linear, embed_dim, bias=bias)
        norm = partial(nn.LayerNorm, eps=eps)
        make = partial(make_multiway, num_modalities=num_modalities)
        self.q_proj = make(partial(project, embed_dim))
        self.k_proj = make(partial(project, kv_dim))
        self.v_proj = make(partial(project, kv_dim))
        self.out_proj = make(partial(project, embed_dim))
        self.q_norm = make(partial(norm, self.head_dim)) if qk_norm else None
        self.k_norm = make(partial(norm, self.head_dim)) if qk_norm else None
        self.inner_norm = make(partial(norm, embed_dim)) if sub_ln else None
        self.rotary = make_rotary(position, self.head_dim, rotary_base)
        self.position_bias = make_position_bias(
            position, num_heads, relative_buckets, relative_max_distance, is_causal
        )

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        position_bias: nn.Module | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        route: Route | None = None,
        attention_op: AttentionOp | None = None,
    ) -> Tensor:
        """Attends within a batch of sequences.

        Args:
            x: Input, (batch, seq_len, embed_dim).
            rotary: Cosine and sine at the positions of `x`, (seq_len, head_dim / 2) each, as
                `RotaryEmbedding` makes them; None: positions 0 to seq_len - 1. Only for
                `position="xpos"` and `"rotary"`.
            position_bias: Bias module that layers share; only for `position=None`.
            key_padding_mask: Bool (batch, seq_len), True = padding.
            cu_seqlens: Boundaries of packed sequences, int32 (num_sequences + 1,), for batch 1.
            route: The modality of every token, for a layer with several.
            attention_op: Op of this call alone, such as `prefix_attention`; None: the attribute.

        Returns:
            Output, (batch, seq_len, embed_dim).

        Raises:
            ValueError: If `x` has another shape, or a position argument does not fit `position`.
            TypeError: If a mask is of another dtype.
            NotImplementedError: If the call brings an op where the attribute has been replaced.
        """
        self._check_inputs(x, rotary, position_bias)
        q, k, v = (
            rearrange(run_routed(project, x, route), "b n (h d) -> b n h d", h=num_heads)
            for project, num_heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = run_routed(self.q_norm, q, route), run_routed(self.k_norm, k, route)
        q, k = self._rotate(q, k, v.dtype, rotary)
        out = self._op(attention_op)(
            q,
            k,
            v,
            self.pattern,
            is_causal=self.is_causal,
            bias=position_bias if self.position_bias is None else self.position_bias,
            xpos_scale_base=self.xpos_scale_base,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
            **({"extra_branches": self.extra_branches} if self.extra_branches else {}),
        )
        out = rearrange(out, "b n h d -> b n (h d)")
        if self.inner_norm is not None:
            out = run_routed(self.inner_norm, out, route)
        return run_routed(self.out_proj, out, route)

    def extra_repr(self) -> str:
        """Lists the options."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"pattern={self.pattern}, is_causal={self.is_causal}, position={self.position!r}, "
            f"dropout={self.dropout}, backend={self.backend!r}"
            + (f", extra_branches={self.extra_branches}" if self.extra_branches else "")
        )

    def _op(self, given: AttentionOp | None) -> AttentionOp:
        op = self.attention_op if given is None else given
        if self.extra_branches and op is not dilated_attention:
            raise NotImplementedError(
                f"extra_branches run by `dilated_attention` alone, got {op!r} with "
                f"{len(self.extra_branches)} of them. Run the model whole: neither parallelized "
                "nor with a cache."
            )
        if given is None:
            return self.attention_op
        if self.attention_op is not dilated_attention:
            raise NotImplementedError(
                "a call brings an op of its own only to layers with `dilated_attention`, got one "
                f"whose attention_op is {self.attention_op!r}: the tokens here may be a part of "
                "the sequences. Use a model that is not parallelized."
            )
        return given

    def _rotate(
        self, q: Tensor, k: Tensor, dtype: torch.dtype, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if self.rotary is not None:
            if rotary is None:
                rotary = self.rotary(torch.arange(q.shape[1], device=q.device))
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        # Autocast makes norms float32; the op wants the dtype of the values.
        return q.to(dtype), k.to(dtype)

    def _check_inputs(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        position_bias: nn.Module | None,
    ) -> None:
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must be (batch, seq_len, embed_dim) with embed_dim={self.embed_dim}, "
                f"got {tuple(x.shape)}."
            )
        if rotary is not None and self.rotary is None:
            raise ValueError(
                "rotary tables need position='xpos' or 'rotary', this layer has "
                f"position={self.position!r}. Leave rotary=None."
            )
        if position_bias is not None and self.position is not None:
            raise ValueError(
                f"position_bias needs position=None, this layer has position={self.position!r}."
            )


def check_branch_options(
    branches: tuple[ConfiguredBranch, ...], position: Position | None, dropout: float
) -> None:
    """Checks that branches beside those of the pattern come with what they serve."""
    if branches and (position not in ("rotary", None) or dropout > 0.0):
        raise NotImplementedError(
            "extra_branches need position='rotary' or None and no dropout of the attention "
            f"weights, got position={position!r} and dropout={dropout}."
        )


def make_rotary(position: Position | None, head_dim: int, base: float) -> RotaryEmbedding | None:
    """Makes the rotary module of a kind of position, or None for kinds without one."""
    return RotaryEmbedding(head_dim=head_dim, base=base) if position in ("xpos", "rotary") else None


def make_position_bias(
    position: Position | None,
    num_heads: int,
    relative_buckets: int,
    relative_max_distance: int,
    is_causal: bool,
) -> AlibiBias | RelativeBias | None:
    """Makes the bias module of a kind of position, or None for kinds without one."""
    if position == "alibi":
        return AlibiBias(num_heads=num_heads)
    if position == "relative":
        return RelativeBias(
            num_heads=num_heads,
            num_buckets=relative_buckets,
            max_distance=relative_max_distance,
            bidirectional=not is_causal,
        )
    return None


def check_attention_options(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    pattern: DilatedPattern,
    dropout: float,
    backend: str,
) -> None:
    """Checks the options that all attention layers share; raises ValueError or TypeError."""
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(
            "embed_dim must be a positive multiple of num_heads, got "
            f"embed_dim={embed_dim} and num_heads={num_heads}."
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, got "
            f"num_heads={num_heads} and num_kv_heads={num_kv_heads}."
        )
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
