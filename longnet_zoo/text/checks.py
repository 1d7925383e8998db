"""Checks of what text functions are given."""

from __future__ import annotations

from longnet_zoo.models.text_decoder import LongNetLM
from longnet_zoo.tokenizers import Tokenizer

__all__ = ["check_vocabulary"]


def check_vocabulary(model: LongNetLM, tokenizer: Tokenizer) -> None:
    """Checks that a model is causal and knows all ids of a tokenizer.

    Raises:
        ValueError: If it lacks some.
        TypeError: If it is no causal model of text.
    """
    if not isinstance(model, LongNetLM):
        raise TypeError(
            f"model must be a LongNetLM, such as longnet_lm_tiny, got {type(model).__name__}."
        )
    vocab_size = model.config.vocab_size or 0
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the model must know all {tokenizer.vocab_size} ids of the tokenizer, got one with "
            f"vocab_size={vocab_size}. Use the tokenizer that it was trained with."
        )
