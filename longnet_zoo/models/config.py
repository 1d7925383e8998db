"""The options that every model has: sizes and switches of its Transformer stack, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longnet_zoo.layers import Activation, Norm
from longnet_zoo.ops.kernels import BACKENDS
from longnet_zoo.ops.pattern import DilatedPattern, HeadOffset, PaddedKeys

from .checks import (
    check_choices,
    check_flags,
    check_heads,
    check_integers,
    check_positive,
    check_probabilities,
)

__all__ = ["ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Options of a Transformer stack.

    Attributes:
        embed_dim: Channels of the residual stream.
        num_layers: Number of blocks.
        num_heads: Number of query heads, a divisor of `embed_dim`.
        num_kv_heads: Number of key and value heads, a divisor of `num_heads`; None: `num_heads`.
        ffn_dim: Hidden channels of the feed-forward network; None: 4 * `embed_dim`.
        segment_lengths: Tokens per segment of each branch, strictly increasing.
        dilation_rates: Dilation rate of each branch.
        head_offset: Where the steps of each head start; see `DilatedPattern`.
        padded_keys: What fills an incomplete segment; see `DilatedPattern`.
        norm: "sub_ln" (Magneto), "pre_ln" or "deepnorm".
        activation: "gelu" or "swiglu".
        qk_norm: Whether queries and keys pass a LayerNorm.
        bias: Whether the linear layers of the blocks have a bias; heads are not concerned.
        dropout: Dropout of the embeddings and of what attention and feed-forward return.
        attention_dropout: Dropout of the attention weights.
        activation_dropout: Dropout of the feed-forward's hidden activation.
        drop_path: Drop-path rate of the last block; it grows linearly from 0.
        eps: Epsilon of the LayerNorms.
        backend: Attention kernel; "auto" takes the fastest that serves.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    segment_lengths: tuple[int, ...] | None
    dilation_rates: tuple[int, ...]
    head_offset: HeadOffset = "modulo"
    padded_keys: PaddedKeys = "ignore"
    norm: Norm = "sub_ln"
    activation: Activation = "gelu"
    qk_norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    eps: float = 1e-5
    backend: str = "auto"

    is_causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, "embed_dim", "num_layers", "num_heads")
        check_integers(self, "num_kv_heads", "ffn_dim", optional=True)
        check_positive(self, "eps")
        check_probabilities(self, "dropout", "attention_dropout", "activation_dropout", "drop_path")
        check_flags(self, "qk_norm", "bias")
        check_choices(self, "norm", "activation")
        check_heads(self)
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}.")
        pattern = self.pattern  # Raises for lengths and rates that make no pattern.
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)
        if self.segment_lengths is not None:
            object.__setattr__(self, "segment_lengths", pattern.segment_lengths)

    @property
    def pattern(self) -> DilatedPattern:
        """The attention pattern."""
        if self.segment_lengths is None:
            raise TypeError("segment_lengths must be a tuple of integers, got None.")
        return self._pattern(self.segment_lengths)

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def usual_seq_len(self) -> int:
        """A typical number of tokens, what `model_info` counts FLOPs for."""
        return self.pattern.segment_lengths[-1]

    def _pattern(self, segment_lengths: tuple[int, ...]) -> DilatedPattern:
        return DilatedPattern(
            segment_lengths=segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offset=self.head_offset,
            padded_keys=self.padded_keys,
        )
