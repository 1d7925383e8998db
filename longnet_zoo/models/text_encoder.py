"""LongNet as a bidirectional encoder for masked language modelling.

The blocks of the causal model (arXiv 2307.02486) without the causal mask. Positions are rotary by
default, not xPos: xPos scales the logit of query i and key j by zeta^((i - j) / base), a decay for
keys behind the query that becomes an unbounded growth for keys ahead of it, so bidirectional
attention would prefer the farthest future, and overflow in long segments. `position="xpos"` remains
possible for published weights that were trained so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from longnet_zoo.layers import Position
from longnet_zoo.registry import register_model

from .text import TextModel
from .text_config import TextConfig

__all__ = ["LongNetMLM", "LongNetMLMConfig", "longnet_mlm_base", "longnet_mlm_tiny"]


@dataclass(frozen=True, kw_only=True)
class LongNetMLMConfig(TextConfig):
    """Options of `LongNetMLM`; the fields are those of `TextConfig`, `position` is "rotary"."""

    position: Position | None = "rotary"

    is_causal: ClassVar[bool] = False


class LongNetMLM(TextModel):
    """Bidirectional encoder with dilated attention and a masked-language-model head.

    `labels` of `loss` are the original tokens at masked positions and `ignore_index` elsewhere:
    logits are made at masked positions only.

    Args:
        config: The options.

    Example:
        >>> model = LongNetMLM(LongNetMLMConfig(vocab_size=259, num_layers=2))
        >>> tokens, labels = torch.randint(256, (1, 4096)), torch.full((1, 4096), -100)
        >>> labels[0, ::7], tokens[0, ::7] = tokens[0, ::7], 257
        >>> loss = model.loss(tokens, labels)
    """

    config_class = LongNetMLMConfig


_register = partial(register_model, family="longnet_mlm", modality="text")


@_register(
    "longnet_mlm_tiny",
    config=LongNetMLMConfig(
        vocab_size=259,
        embed_dim=128,
        num_layers=4,
        num_heads=4,
        segment_lengths=(512, 1024, 2048, 4096, 8192),
        dilation_rates=(1, 2, 4, 8, 16),
    ),
    description="masked LM over bytes, for laptops",
    source="this project",
)
def longnet_mlm_tiny(config: LongNetMLMConfig) -> LongNetMLM:
    """Builds a model of 0.8M parameters over bytes and three special tokens."""
    return LongNetMLM(config)


@_register(
    "longnet_mlm_base",
    config=LongNetMLMConfig(embed_dim=768, num_layers=12, num_heads=12),
    description="masked LM, sizes of the 125M LM",
    source="this project, sizes of arXiv 2307.02486, Table 4",
)
def longnet_mlm_base(config: LongNetMLMConfig) -> LongNetMLM:
    """Builds the bidirectional twin of the paper's 125M model."""
    return LongNetMLM(config)
