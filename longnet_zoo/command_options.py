"""Arguments that several commands take: `--option NAME=VALUE` and `--dtype`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from typing import Any

__all__ = ["add_dtype_argument", "add_option_argument", "read_options"]


def add_option_argument(command: argparse.ArgumentParser, *, words: str) -> None:
    """Adds `--option NAME=VALUE`, which may be repeated, with these words of help."""
    command.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help=f"{words}; repeatable"
    )


def add_dtype_argument(command: argparse.ArgumentParser) -> None:
    """Adds `--dtype`, the name of a floating-point type of torch."""
    names = ("float32", "bfloat16", "float16")
    command.add_argument("--dtype", choices=names, default="float32", help="default: float32")


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """Reads NAME=VALUE: numbers, lists of them, true, false, null, and else words.

    Raises:
        ValueError: If there is no name or no value, or a number is not finite.
    """
    return dict(map(_read_option, texts))


def _read_option(text: str) -> tuple[str, Any]:
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
