"""The options that all text models share, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longnet_zoo.layers import Activation, Norm, Position
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

__all__ = ["PAPER_DILATION_RATES", "PAPER_SEGMENT_LENGTHS", "TextConfig"]

# LongNet (arXiv 2307.02486), Sec. 4.2.
PAPER_SEGMENT_LENGTHS = (2048, 4096, 8192, 16384, 32768)
PAPER_DILATION_RATES = (1, 2, 4, 6, 12)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Options of a text model; the defaults are the 125M model of the LongNet paper.

    Attributes:
        vocab_size: Number of token ids; None for a model without token embedding, which takes
            `inputs_embeds`.
        embed_dim: Channels of the residual stream.
        num_layers: Number of blocks.
        num_heads: Number of query heads, a divisor of `embed_dim`.
        num_kv_heads: Number of key and value heads, a divisor of `num_heads`; None: `num_heads`.
        ffn_dim: Hidden channels of the feed-forward network; None: 4 * `embed_dim`.
        segment_lengths: Tokens per segment of each branch, strictly increasing.
        dilation_rates: Dilation rate of each branch.
        head_offset: Where the steps of each head start; see `DilatedPattern`.
        padded_keys: What fills an incomplete segment; see `DilatedPattern`.
        position: How positions enter attention: "xpos", "rotary", "alibi", "relative" or None.
        rotary_base: Ratio of the longest to the shortest wavelength, for "xpos" and "rotary".
        xpos_scale_base: Scale base in tokens, for "xpos".
        relative_buckets: Number of distance buckets, for "relative".
        relative_max_distance: Tokens from which on all distances share a bucket, for "relative".
        norm: "sub_ln" (Magneto), "pre_ln" or "deepnorm".
        activation: "gelu" or "swiglu".
        qk_norm: Whether queries and keys pass a LayerNorm.
        bias: Whether linear layers have a bias; the output head has none.
        dropout: Dropout of the embeddings and of what attention and feed-forward return.
        attention_dropout: Dropout of the attention weights.
        activation_dropout: Dropout of the feed-forward's hidden activation.
        drop_path: Drop-path rate of the last block; it grows linearly from 0.
        eps: Epsilon of the LayerNorms.
        tie_embeddings: Whether the output head is the token embedding, transposed.
        scale_embedding: Whether embeddings are multiplied by sqrt(embed_dim).
        num_outputs: Logits per token; None: `vocab_size`, 0: no head.
        backend: Attention kernel; "auto" takes the fastest that serves.
    """

    vocab_size: int | None = 100_256
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    segment_lengths: tuple[int, ...] = PAPER_SEGMENT_LENGTHS
    dilation_rates: tuple[int, ...] = PAPER_DILATION_RATES
    head_offset: HeadOffset = "modulo"
    padded_keys: PaddedKeys = "ignore"
    position: Position | None = "xpos"
    rotary_base: float = 10000.0
    xpos_scale_base: float = 512.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm: Norm = "sub_ln"
    activation: Activation = "gelu"
    qk_norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    eps: float = 1e-5
    tie_embeddings: bool = True
    scale_embedding: bool = False
    num_outputs: int | None = None
    backend: str = "auto"

    is_causal: ClassVar[bool]

    def __post_init__(self) -> None:
        check_integers(self, "embed_dim", "num_layers", "num_heads")
        check_integers(self, "relative_buckets", minimum=2)
        check_integers(self, "relative_max_distance", minimum=2)
        check_integers(self, "vocab_size", "num_kv_heads", "ffn_dim", optional=True)
        check_integers(self, "num_outputs", minimum=0, optional=True)
        check_positive(self, "rotary_base", "xpos_scale_base", "eps")
        check_probabilities(self, "dropout", "attention_dropout", "activation_dropout", "drop_path")
        check_flags(self, "qk_norm", "bias", "tie_embeddings", "scale_embedding")
        check_choices(self, "position", "norm", "activation")
        check_heads(self)
        self._check_combinations()
        pattern = self.pattern  # Raises for lengths and rates that make no pattern.
        object.__setattr__(self, "segment_lengths", pattern.segment_lengths)
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)

    @property
    def pattern(self) -> DilatedPattern:
        """The attention pattern."""
        return DilatedPattern(
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offset=self.head_offset,
            padded_keys=self.padded_keys,
        )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.embed_dim // self.num_heads

    @property
    def head_size(self) -> int:
        """Logits per token; 0 for a model without a head."""
        return (self.vocab_size or 0) if self.num_outputs is None else self.num_outputs

    @property
    def has_tied_head(self) -> bool:
        """Whether logits are made with the token embedding."""
        return self.tie_embeddings and self.head_size > 0

    def _check_combinations(self) -> None:
        if self.rotary_base <= 1.0:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}.")
        if self.position == "relative":
            self._check_relative()
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}.")
        if self.position in ("xpos", "rotary") and self.head_dim % 2:
            raise ValueError(
                f"position={self.position!r} needs an even head_dim = embed_dim / num_heads, got "
                f"embed_dim={self.embed_dim} and num_heads={self.num_heads}."
            )
        if self.has_tied_head and self.head_size != self.vocab_size:
            raise ValueError(
                "tie_embeddings=True needs num_outputs equal to vocab_size, got "
                f"num_outputs={self.num_outputs} and vocab_size={self.vocab_size}. "
                "Pass tie_embeddings=False."
            )

    def _check_relative(self) -> None:
        # Causal attention has no buckets for later keys.
        num_directed = self.relative_buckets // (1 if self.is_causal else 2)
        if num_directed < 2 or (not self.is_causal and self.relative_buckets % 2):
            raise ValueError(
                "relative_buckets must be an even number of at least 4 for bidirectional "
                f"attention, got {self.relative_buckets}."
            )
        if self.relative_max_distance <= num_directed // 2:
            raise ValueError(
                f"relative_max_distance must exceed {num_directed // 2}, the distances that have a "
                f"bucket of their own with relative_buckets={self.relative_buckets}, got "
                f"{self.relative_max_distance}."
            )
