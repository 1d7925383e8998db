"""Checks that the families share: one clear error for a bad option, token or mask.

Those of a config take names of its fields, so that messages carry the name the user typed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from longnet_zoo.ops.arguments import can_read

__all__ = [
    "check_choices",
    "check_finite",
    "check_flags",
    "check_heads",
    "check_integers",
    "check_mask",
    "check_on_the_right",
    "check_positive",
    "check_probabilities",
    "check_tokens",
    "integer_list",
    "prompt_lengths",
    "right_padded_lengths",
]


def check_integers(config: Any, *names: str, minimum: int = 1, optional: bool = False) -> None:
    """Checks that fields are integers (no bools) of at least `minimum`, or None if `optional`."""
    for name in names:
        value = getattr(config, name)
        if optional and value is None:
            continue
        rule = f"{name} must be an integer of at least {minimum}{' or None' if optional else ''}"
        if type(value) is not int:
            raise TypeError(f"{rule}, got {value!r} ({type(value).__name__}).")
        if value < minimum:
            raise ValueError(f"{rule}, got {value}.")


def check_finite(config: Any, *names: str) -> None:
    """Checks that fields are finite numbers."""
    for name in names:
        value = _number(config, name, "a finite number")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}.")


def check_positive(config: Any, *names: str) -> None:
    """Checks that fields are finite numbers above 0."""
    for name in names:
        value = _number(config, name, "a positive number")
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value}.")


def check_probabilities(config: Any, *names: str) -> None:
    """Checks that fields are numbers in [0, 1)."""
    for name in names:
        value = _number(config, name, "a number in [0, 1)")
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be a number in [0, 1), got {value}.")


def check_flags(config: Any, *names: str) -> None:
    """Checks that fields are bools."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_choices(config: Any, *names: str) -> None:
    """Checks that fields hold one of the values of their `Literal` (or None if annotated)."""
    hints = get_type_hints(type(config))
    for name in names:
        value, allowed = getattr(config, name), _literal_values(hints[name])
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}."
            )


def check_heads(config: Any) -> None:
    """Checks that `num_heads` divides `embed_dim`, and `num_kv_heads` divides `num_heads`."""
    if config.embed_dim % config.num_heads:
        raise ValueError(
            "embed_dim must be a multiple of num_heads, got "
            f"embed_dim={config.embed_dim} and num_heads={config.num_heads}."
        )
    if config.num_kv_heads is not None and config.num_heads % config.num_kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, got "
            f"num_heads={config.num_heads} and num_kv_heads={config.num_kv_heads}."
        )


def check_tokens(tokens: Tensor, *, vocab_size: int, length: str = "seq_len") -> None:
    """Checks token ids: integers (batch, seq_len) in [0, vocab_size), with at least one token.

    Args:
        tokens: Token ids.
        vocab_size: Number of token ids.
        length: What messages call the second axis.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens must be a tensor (batch, {length}), got {type(tokens).__name__}. "
            "Use torch.tensor(tokens)."
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"tokens must be int64 or int32, got {tokens.dtype}. Convert them with .long()."
        )
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"tokens must be (batch, {length}) with at least one token, got "
            f"{tuple(tokens.shape)}. Add the batch with tokens[None] if there is none."
        )
    # Reading values would stall a GPU, which checks by itself.
    if tokens.device.type == "cpu" and can_read(tokens):
        lowest, highest = torch.stack(tokens.aminmax()).tolist()
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(
                f"tokens must be in [0, vocab_size) with vocab_size={vocab_size}, got values from "
                f"{lowest} to {highest}."
            )


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """Checks that a mask is bool and of a shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}. Convert it with .bool().")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(mask.shape)}.")


def check_on_the_right(name: str, padding_mask: Tensor) -> None:
    """Checks that no token comes behind padding."""
    if not can_read(padding_mask):
        return
    wrong = (padding_mask[:, :-1] & ~padding_mask[:, 1:]).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{name} must be True on the right alone, behind all tokens of a text, got tokens "
            f"behind padding in rows {wrong}. Move them to the front."
        )


def right_padded_lengths(name: str, padding_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Checks a mask that is True on the right alone, and counts the tokens of each row: (b,)."""
    check_mask(name, padding_mask, shape)
    check_on_the_right(name, padding_mask)
    return (~padding_mask).sum(1)


def prompt_lengths(name: str, padding_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Counts the tokens of prompts that are padded on the right, at least one of each: (b,)."""
    lengths = right_padded_lengths(name, padding_mask, shape)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{name} must leave each prompt a token, got none for prompts {empty}.")
    return lengths


def integer_list(name: str, values: Iterable[int]) -> list[int]:
    """Makes a list of integers (no bools, no floats) of any sequence, array or tensor of them."""
    try:
        numbers = list(values)
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError
        return [operator.index(number) for number in numbers]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}.") from None


def _number(config: Any, name: str, rule: str) -> float:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {rule}, got {value!r} ({type(value).__name__}).")
    return float(value)


def _literal_values(hint: Any) -> tuple[Any, ...]:
    """Values of `Literal[...]`, and None for a union with it."""
    values: list[Any] = []
    for argument in get_args(hint):
        if argument is type(None):
            values.append(None)
        elif get_args(argument):
            values.extend(get_args(argument))
        else:
            values.append(argument)
    return tuple(values)
