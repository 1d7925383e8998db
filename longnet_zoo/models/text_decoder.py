"""LongNet as a causal language model (arXiv 2307.02486): Magneto decoder with xPos.

Token embedding, a stack of causal dilated-attention blocks (sub-LN), and the embedding again as
output head. Sizes at the foot of the file follow the paper's Tables 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from longnet_zoo.registry import PublishedWeights, register_model

from .generation import GeneratesText
from .text import TextModel
from .text_config import TextConfig

__all__ = [
    "LongNetLM",
    "LongNetLMConfig",
    "longnet_lm_2b7",
    "longnet_lm_350m",
    "longnet_lm_760m",
    "longnet_lm_base",
    "longnet_lm_tiny",
]


@dataclass(frozen=True, kw_only=True)
class LongNetLMConfig(TextConfig):
    """Options of `LongNetLM`; the fields are those of `TextConfig`."""

    is_causal: ClassVar[bool] = True


class LongNetLM(GeneratesText, TextModel):
    """Causal language model with dilated attention: position i predicts token i + 1.

    `labels` of `loss` are the tokens to predict, shifted by the caller, so that packed rows and
    document boundaries stay in the caller's hands.

    Args:
        config: The options.

    Example:
        >>> model = LongNetLM(LongNetLMConfig(vocab_size=259, num_layers=2))
        >>> tokens = torch.randint(259, (1, 4097))
        >>> loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    """

    config_class = LongNetLMConfig


_register = partial(register_model, family="longnet_lm", modality="text")


@_register(
    "longnet_lm_tiny",
    config=LongNetLMConfig(
        vocab_size=259,
        embed_dim=192,
        num_layers=4,
        num_heads=4,
        segment_lengths=(4096, 32768),
        dilation_rates=(1, 4),
    ),
    description="causal LM over bytes, for laptops",
    source="this project",
    weights=(
        PublishedWeights(
            tag="pystdlib",
            location="shipped:longnet_lm_tiny",
            licence="Apache-2.0",
            note="bytes of Python code, context 32,768",
            sha256="aad7e8b8be10447bb536407e656bbd348b35ba9ce997ea448186c0a6d1a2ad2f",
        ),
    ),
)
def longnet_lm_tiny(config: LongNetLMConfig) -> LongNetLM:
    """Builds a model of 1.8M parameters over bytes and three special tokens."""
    return LongNetLM(config)


@_register(
    "longnet_lm_base",
    config=LongNetLMConfig(embed_dim=768, num_layers=12, num_heads=12),
    description="causal LM, the paper's 125M",
    source="arXiv 2307.02486, Sec. 4.2 and Table 4",
)
def longnet_lm_base(config: LongNetLMConfig) -> LongNetLM:
    """Builds the paper's 125M model."""
    return LongNetLM(config)


@_register(
    "longnet_lm_350m",
    config=LongNetLMConfig(embed_dim=1024, num_layers=24, num_heads=16),
    description="causal LM, the paper's 350M",
    source="arXiv 2307.02486, Table 4",
)
def longnet_lm_350m(config: LongNetLMConfig) -> LongNetLM:
    """Builds the paper's 350M model."""
    return LongNetLM(config)


@_register(
    "longnet_lm_760m",
    config=LongNetLMConfig(embed_dim=1536, num_layers=24, num_heads=16),
    description="causal LM, the paper's 760M",
    source="arXiv 2307.02486, Table 4",
)
def longnet_lm_760m(config: LongNetLMConfig) -> LongNetLM:
    """Builds the paper's 760M model."""
    return LongNetLM(config)


@_register(
    "longnet_lm_2b7",
    config=LongNetLMConfig(embed_dim=2560, num_layers=32, num_heads=32),
    description="causal LM, the paper's 2.7B",
    source="arXiv 2307.02486, Table 4",
)
def longnet_lm_2b7(config: LongNetLMConfig) -> LongNetLM:
    """Builds the paper's 2.7B model."""
    return LongNetLM(config)
