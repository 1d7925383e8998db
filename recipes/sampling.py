"""How text models write in recipes, and what of it is shown.

Shapes: n tokens, v vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longnet_zoo.ops.sampling import Sampling

__all__ = ["SamplingConfig", "fill"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Sampling):
    """How `predict` and the report write text.

    Attributes:
        prompts: Texts to continue, or in which a masked language model fills each `mask`; None
            takes those of the recipe.
        max_new_tokens: Most tokens written after a prompt.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draws from this many of the likeliest tokens; None draws from all.
        stop_strings: Texts that end what is written.
        mask: Text that stands for one hidden token in a prompt of a masked language model.
        seed: Start of the random numbers, so that a checkpoint writes the same text twice.
        top_p: As for `Sampling`, like `min_p` and `repetition_penalty`.
    """

    prompts: tuple[str, ...] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = 40
    stop_strings: tuple[str, ...] = ()
    mask: str = "<mask>"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and not (self.prompts and all(self.prompts)):
            raise ValueError(
                f"prompts must be one or more texts that are not empty, got {self.prompts!r}."
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}.")
        if not self.mask:
            raise ValueError(f"mask must not be empty, got {self.mask!r}.")

    def options(self) -> dict[str, Any]:
        """Returns the options of a model's `generate`."""
        options = dataclasses.asdict(self)
        return {name: x for name, x in options.items() if name not in ("prompts", "mask")}


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
