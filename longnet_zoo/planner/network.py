"""What a plan needs to know of a model, read off the model itself; no memory for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from longnet_zoo.factory import create_model
from longnet_zoo.layers import DilatedAttention, Multiway, TransformerBlock
from longnet_zoo.models import TextModel, ZooModel
from longnet_zoo.ops.pattern import DENSE_SEGMENT, DilatedPattern

__all__ = ["Network", "dense_pattern", "describe"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes and switches of a model that decide what a training step costs.

    Attributes:
        model: The model, without memory for its weights.
        is_text: Whether it takes tokens, so that each rank needs only its part of them.
        num_params: Parameters, tied ones once.
        block_params: Parameters of one block.
        head_rows: Rows of the matrix that makes the logits; 0 without.
        has_tied_head: Whether that matrix is the token embedding as well.
        embed_dim: Channels of the residual stream.
        ffn_dim: Hidden channels of the feed-forward network.
        num_layers: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        pattern: The attention pattern.
        is_causal: Whether a query sees no later key.
        is_post_norm: Whether norms come after the residual sum (DeepNorm).
        has_inner_norm: Whether there are norms before the output projections.
        has_qk_norm: Whether queries and keys pass a norm.
        has_rotary: Whether queries and keys are rotated.
        xpos_scale_base: Scale base of their decay, or None.
        has_bias: Whether a bias by distance is added to the logits.
        is_gated: Whether the feed-forward network is gated (SwiGLU).
        dropout: Whether what attention and feed-forward return is dropped out.
        activation_dropout: Whether the hidden activation is.
    """

    model: ZooModel
    is_text: bool
    num_params: int
    block_params: int
    head_rows: int
    has_tied_head: bool
    embed_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    pattern: DilatedPattern
    is_causal: bool
    is_post_norm: bool
    has_inner_norm: bool
    has_qk_norm: bool
    has_rotary: bool
    xpos_scale_base: float | None
    has_bias: bool
    is_gated: bool
    dropout: bool
    activation_dropout: bool

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Channels of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def root_params(self) -> int:
        """Parameters outside of the blocks."""
        return self.num_params - self.num_layers * self.block_params

    @property
    def largest_weight(self) -> int:
        """Entries of the largest matrix of a block."""
        return self.embed_dim * max(self.embed_dim, self.ffn_dim)

    def linear_flops(self, seq_len: int) -> int:
        """FLOPs of all matrix products but those of attention, forward, for one sequence."""
        attention, _ = self.pattern.flops(
            seq_len, self.num_heads, self.head_dim, is_causal=self.is_causal
        )
        return self.model.flops(seq_len) - self.num_layers * attention


def describe(name: str, options: Mapping[str, Any]) -> Network:
    """Reads a registered model with some options.

    Raises:
        ValueError: If the name is unknown or an option has a bad value,
            or the model is made of several stacks.
        TypeError: If an option is unknown or of the wrong type.
        NotImplementedError: If the model has `extra_branches`.
    """
    with torch.device("meta"):
        model = cast(ZooModel, create_model(name, **options))
    if "stack" not in dict(model.named_children()):
        parts = ", ".join(part for part, _ in model.named_children())
        raise ValueError(
            f"a plan is for a model with one stack of blocks, got {name!r}, which has the parts "
            f"{parts}. Plan a model of the size of its largest part."
        )
    block = cast(TransformerBlock, model.stack.blocks[0])
    attention = cast(DilatedAttention, block.attention)
    if attention.extra_branches:
        raise NotImplementedError(
            "a plan knows dilated branches only, got a model with extra_branches="
            f"{attention.extra_branches}. Plan it without them, or count them by model.flops."
        )
    feed = block.feed_forward
    feed = feed.experts[0] if isinstance(feed, Multiway) else feed
    head = model.head_weight if isinstance(model, TextModel) else None
    return Network(
        model=model,
        is_text=isinstance(model, TextModel),
        num_params=model.num_params(),
        block_params=_count(block),
        head_rows=0 if head is None else head.shape[0],
        has_tied_head=isinstance(model, TextModel) and model.config.has_tied_head,
        embed_dim=attention.embed_dim,
        ffn_dim=cast(nn.Linear, feed.fc1).out_features,
        num_layers=len(model.stack.blocks),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        pattern=attention.pattern,
        is_causal=attention.is_causal,
        is_post_norm=block.norm == "deepnorm",
        has_inner_norm=attention.inner_norm is not None,
        has_qk_norm=attention.q_norm is not None,
        has_rotary=attention.rotary is not None,
        xpos_scale_base=attention.xpos_scale_base,
        has_bias=model.stack.position_bias is not None,
        is_gated=feed.gate is not None,
        dropout=block.dropout.p > 0,
        activation_dropout=cast(nn.Dropout, feed.dropout).p > 0,
    )


def dense_pattern(seq_len: int) -> DilatedPattern:
    """The pattern by which every query sees every key."""
    return DilatedPattern(segment_lengths=(max(seq_len, DENSE_SEGMENT),), dilation_rates=(1,))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
