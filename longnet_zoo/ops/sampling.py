"""Draws tokens from logits.

The order of the steps, each on what the one before has left: penalty of tokens that were seen,
banned tokens, temperature, top-k, top-p, min-p.

Shape legend: b batch, v vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .arguments import can_read

__all__ = ["Sampling", "draw_tokens"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_k: Draw among so many of the likeliest tokens; None: among all.
        top_p: Draw among the fewest of the likeliest tokens that together have this probability
            (nucleus sampling, arXiv 1904.09751); None: among all.
        min_p: Draw among the tokens that have at least this share of the likeliest one's
            probability (arXiv 2407.01082); None: among all.
        repetition_penalty: What the logits of tokens seen before are divided by where positive and
            multiplied by where negative (arXiv 1909.05858); 1: nothing.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value is no number.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k is not None and type(self.top_k) is not int:
            raise TypeError(f"top_k must be None or an integer, got {self.top_k!r}.")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number and not (value is None and name in ("top_p", "min_p")):
                raise TypeError(f"{name} must be a number, got {value!r}.")
        for name, value, is_right, rule in (
            ("temperature", self.temperature, _is_in(self.temperature, 0.0), "finite, 0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "None, or 1 or more"),
            ("top_p", self.top_p, _is_share(self.top_p), "None, or in (0, 1]"),
            ("min_p", self.min_p, _is_share(self.min_p), "None, or in (0, 1]"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                _is_in(self.repetition_penalty, 0.0) and self.repetition_penalty > 0,
                "finite, above 0",
            ),
        ):
            if not is_right:
                raise ValueError(f"{name} must be {rule}, got {value}.")


def draw_tokens(
    logits: Tensor,
    sampling: Sampling,
    *,
    generator: torch.Generator | None = None,
    seen: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor = (),
) -> Tensor:
    """Draws a token for each row.

    Args:
        logits: Logits, (batch, vocab_size).
        sampling: How to draw.
        generator: Random numbers, on the device of the logits; None: the global ones.
        seen: Bool (batch, vocab_size), True at tokens to which the penalty applies; None: none.
        banned_ids: Tokens that are never drawn; an int64 tensor on the device saves a copy.

    Returns:
        Token ids, int64 (batch,).

    Raises:
        ValueError: If the largest logit of a row is not finite: there are NaN among them, or all
            tokens are banned.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalized, logits)
    if len(banned_ids):
        banned = torch.as_tensor(banned_ids, device=logits.device)
        logits = logits.index_fill(1, banned, -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    if can_read(largest) and not bool(largest.isfinite().all()):
        rows = (~largest.isfinite()).flatten().nonzero().flatten().tolist()
        raise ValueError(
            "the largest logit of each row must be finite, and that of rows "
            f"{rows} is {largest[rows[0]].item()}: the model has overflowed, or all tokens are "
            f"banned ({len(banned_ids)} of {logits.shape[1]} are)."
        )
    if sampling.temperature < torch.finfo(logits.dtype).tiny:  # no more than 0 to divide by
        return logits.argmax(-1)
    # The difference first: divided by next to nothing, the logits themselves would overflow.
    logits = (logits - largest) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        likeliest = logits.topk(sampling.top_k)
        left_out = torch.full_like(logits, -torch.inf)
        logits = left_out.scatter(1, likeliest.indices, likeliest.values)
    if sampling.top_p is not None:
        logits = _nucleus(logits, sampling.top_p)
    probabilities = logits.softmax(-1)
    if sampling.min_p is not None:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    # A token stays if those before it do not reach the share yet: the likeliest one always does.
    is_left_out = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(is_left_out.gather(1, order.argsort(-1)), -torch.inf)


def _is_in(value: float, least: float) -> bool:
    return math.isfinite(value) and value >= least


def _is_share(value: float | None) -> bool:
    return value is None or 0.0 < value <= 1.0
