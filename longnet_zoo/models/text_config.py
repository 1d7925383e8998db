"""The options that all text models share, checked."""

from __future__ import annotations

from dataclasses import dataclass

from longnet_zoo.layers import Position
from longnet_zoo.layers.attention import check_branch_options
from longnet_zoo.ops.branches import ConfiguredBranch, make_branches

from .checks import check_choices, check_flags, check_integers, check_positive
from .config import ModelConfig

__all__ = ["PAPER_DILATION_RATES", "PAPER_SEGMENT_LENGTHS", "TextConfig"]

# LongNet (arXiv 2307.02486), Sec. 4.2.
PAPER_SEGMENT_LENGTHS = (2048, 4096, 8192, 16384, 32768)
PAPER_DILATION_RATES = (1, 2, 4, 6, 12)


@dataclass(frozen=True, kw_only=True)
class TextConfig(ModelConfig):
    """Options of a text model; the defaults are the 125M model of the LongNet paper.

    Attributes:
        vocab_size: Number of token ids; None for a model without token embedding, which takes
            `inputs_embeds`.
        position: How positions enter attention: "xpos", "rotary", "alibi", "relative" or None.
        rotary_base: Ratio of the longest to the shortest wavelength, for "xpos" and "rotary".
        xpos_scale_base: Scale base in tokens, for "xpos".
        relative_buckets: Number of distance buckets, for "relative".
        relative_max_distance: Tokens from which on all distances share a bucket, for "relative".
        tie_embeddings: Whether the output head is the token embedding, transposed.
        scale_embedding: Whether embeddings are multiplied by sqrt(embed_dim).
        num_outputs: Logits per token; None: `vocab_size`, 0: no head.
        extra_branches: Branches of attention beside those of the pattern: `BigBirdBlocks`,
            `HashBuckets`, or mappings of their fields with a `kind`, "big_bird" or "hash_buckets".
            Only for position "rotary" or None, and without attention_dropout. Each layer draws by a
            seed of its own, made of that of the branch.
        embed_dim: As for `ModelConfig`, like all fields that are not in this list.
    """

    vocab_size: int | None = 100_256
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    segment_lengths: tuple[int, ...] = PAPER_SEGMENT_LENGTHS
    dilation_rates: tuple[int, ...] = PAPER_DILATION_RATES
    position: Position | None = "xpos"
    rotary_base: float = 10000.0
    xpos_scale_base: float = 512.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    tie_embeddings: bool = True
    scale_embedding: bool = False
    num_outputs: int | None = None
    extra_branches: tuple[ConfiguredBranch, ...] = ()

    def __post_init__(self) -> None:
        check_integers(self, "relative_buckets", minimum=2)
        check_integers(self, "relative_max_distance", minimum=2)
        check_integers(self, "vocab_size", optional=True)
        check_integers(self, "num_outputs", minimum=0, optional=True)
        check_positive(self, "rotary_base", "xpos_scale_base")
        check_flags(self, "tie_embeddings", "scale_embedding")
        check_choices(self, "position")
        object.__setattr__(self, "extra_branches", make_branches(self.extra_branches))
        super().__post_init__()
        check_branch_options(self.extra_branches, self.position, self.attention_dropout)
        self._check_combinations()

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
