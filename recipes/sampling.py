"""Continues text token by token, by running the whole model on all that is there so far.

Shapes: n tokens so far, v vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SamplingConfig", "complete", "fill", "printable"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How `predict` and the report write text.

    Attributes:
        prompts: Texts to continue, or in which a masked language model fills each `mask`; None
            takes those of the recipe.
        max_new_tokens: Most tokens written after a prompt.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draws from this many of the likeliest tokens; None draws from all.
        mask: Text that stands for one hidden token in a prompt of a masked language model.
        seed: Start of the random numbers, so that a checkpoint writes the same text twice.
    """

    prompts: tuple[str, ...] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = 40
    mask: str = "<mask>"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts is not None and not (self.prompts and all(self.prompts)):
            raise ValueError(
                f"prompts must be one or more texts that are not empty, got {self.prompts!r}."
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be None or 1 or more, got {self.top_k}.")
        if not self.mask:
            raise ValueError(f"mask must not be empty, got {self.mask!r}.")


@torch.no_grad()
def complete(
    model: Any,
    prompt: Tensor,
    *,
    config: SamplingConfig,
    stop_id: int | None = None,
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """Continues a prompt with a causal model.

    Args:
        model: A language model with `forward_features` and `forward_head`.
        prompt: Token ids, (seq_len,), at least one.
        config: How to draw.
        stop_id: Token after which to stop.
        banned_ids: Tokens that are never drawn.

    Returns:
        The new token ids, without the prompt, (num_new_tokens,).
    """
    generator = torch.Generator(prompt.device).manual_seed(config.seed)
    tokens = prompt
    for _ in range(config.max_new_tokens):
        features = model.forward_features(tokens[None])
        logits = model.forward_head(features[:, -1:])[0, 0].float()
        logits[list(banned_ids)] = float("-inf")
        token = draw(logits, config=config, generator=generator)
        tokens = torch.cat([tokens, token])
        if int(token) == stop_id:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def fill(model: Any, tokens: Tensor, *, mask_id: int, banned_ids: Sequence[int] = ()) -> Tensor:
    """Replaces every mask by the token that a bidirectional model holds likeliest.

    Args:
        model: A language model, tokens (batch, seq_len) to logits.
        tokens: Token ids, (seq_len,).
        mask_id: Token to replace.
        banned_ids: Tokens that are never put in.

    Returns:
        The token ids with nothing masked, (seq_len,).
    """
    logits = model.forward_head(model.forward_features(tokens[None]))[0]
    logits[:, [mask_id, *banned_ids]] = float("-inf")
    return torch.where(tokens == mask_id, logits.argmax(-1), tokens)


def draw(logits: Tensor, *, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Draws a token id, (1,), from logits, (vocab_size,)."""
    if config.temperature == 0:
        return logits.argmax().reshape(1)
    if config.top_k is not None and config.top_k < len(logits):
        lowest = logits.topk(config.top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    probabilities = torch.softmax(logits / config.temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)


def printable(text: str) -> str:
    """Replaces what could move a terminal's cursor or is no text by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
