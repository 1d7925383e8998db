"""Checks that the config of every family shares: one clear error for a field with a bad value.

Each takes the config and names of its fields, so that messages carry the name the user typed.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, get_args, get_type_hints

__all__ = [
    "check_choices",
    "check_flags",
    "check_heads",
    "check_integers",
    "check_positive",
    "check_probabilities",
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
