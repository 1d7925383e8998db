"""Options of a model as they are typed on a command line: NAME=VALUE."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["read_option"]


def read_option(text: str) -> tuple[str, Any]:
    """Reads NAME=VALUE: numbers, lists of them, true, false, null, and else words.

    Raises:
        ValueError: If there is no name or no value, or a number is not finite.
    """
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}.")
    if "," in value:
        return name, tuple(_read_value(x) for x in value.split(",") if x)
    return name, _read_value(value)


def _read_value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise ValueError(f"--option takes finite numbers, got {text!r}.")
    return int(value) if "e" in text.lower() and value.is_integer() else value
