"""Arguments that several commands take: `--option NAME=VALUE` and `--dtype`."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["add_dtype_argument", "add_option_argument", "read_options", "weights_source"]


def add_option_argument(command: argparse.ArgumentParser, *, words: str) -> None:
    """Adds `--option NAME=VALUE`, which may be repeated, with these words of help."""
    command.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help=f"{words}; repeatable"
    )


def add_dtype_argument(command: argparse.ArgumentParser) -> None:
    """Adds `--dtype`, the name of a floating-point type of torch."""
    names = ("float32", "bfloat16", "float16")
    command.add_argument("--dtype", choices=names, default="float32", help="default: float32")


def weights_source(text: str) -> str:
    """Reads `--pretrained`, which is no switch.

    Raises:
        ArgumentTypeError: If it is True or False, as in Python.
    """
    if text.lower() in ("true", "false"):
        raise argparse.ArgumentTypeError(
            f"takes a place of weights and is no switch, got {text!r}. Give a tag that "
            "`longnet-zoo info MODEL` shows, a file or a folder."
        )
    return text


def read_options(texts: Iterable[str], *, function: Callable[..., Any]) -> dict[str, Any]:
    """Reads NAME=VALUE: JSON, lists without brackets, and else words.

    Args:
        texts: As they are typed.
        function: What will take them as `**options`; its arguments of its own are none of them.

    Raises:
        ValueError: If there is no name or no value, a name comes twice or is none of an option, or
            a number is not finite.
    """
    options: dict[str, Any] = {}
    own = inspect.signature(function).parameters.values()
    taken = {parameter.name for parameter in own if parameter.kind != parameter.VAR_KEYWORD}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"--option must be NAME=VALUE, got {text!r}.")
        if name in taken:
            raise ValueError(
                f"--option takes no {name}, got {text!r}. Where the command has it, --help says "
                "how it is given."
            )
        if name in options:
            raise ValueError(f"--option must give {name} once, got it twice. Leave one out.")
        options[name] = _read_value(value)
    return options


def _read_value(text: str) -> Any:
    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"--option takes finite numbers, got {text!r}.")
        return int(value) if "e" in digits.lower() and value.is_integer() else value

    try:
        value = json.loads(text, parse_float=number, parse_constant=number)
    except json.JSONDecodeError:
        if "," not in text:
            return text
        value = [_read_value(part) for part in text.split(",") if part]
    return tuple(value) if isinstance(value, list) else value
