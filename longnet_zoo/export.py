"""What `longnet-zoo export` does: weights from anywhere, as a folder that everything here loads."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from longnet_zoo.command_options import (
    add_dtype_argument,
    add_option_argument,
    read_options,
    weights_source,
)
from longnet_zoo.factory import create_model
from longnet_zoo.models import ZooModel
from longnet_zoo.registry import find_model
from longnet_zoo.weights.keys import as_arguments

__all__ = ["add_export_command"]


def add_export_command(commands: Any) -> None:
    """Adds the command to those of `longnet-zoo`."""
    command = commands.add_parser(
        "export",
        help="write a model with its weights as a folder",
        description="Loads weights from anywhere and writes model.safetensors, config.json and a "
        "card into a folder, which --pretrained and the Hub take.",
    )
    command.add_argument("model", help="name of the model")
    command.add_argument(
        "--pretrained",
        type=weights_source,
        required=True,
        metavar="SOURCE",
        help="its weights: a tag, a file, a folder, a recipe's checkpoint or hf_hub:owner/name",
    )
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new one")
    add_dtype_argument(command)
    add_option_argument(command, words="an option of the model, where the weights do not say it")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    folder: Path = options.output
    given = read_options(options.option, function=create_model)
    with _new_folder(folder) as unfinished:
        model = create_model(options.model, pretrained=options.pretrained, **given)
        assert isinstance(model, ZooModel)
        model.to(getattr(torch, options.dtype))
        model.save_pretrained(unfinished)
        card = _card(options, model, given)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    words = ["--pretrained", str(folder)]
    words += [word for text in options.option for word in ("--option", text)]
    size = sum(file.stat().st_size for file in folder.iterdir())
    sys.stdout.write(
        f"{folder}: {type(model).__name__}, {model.num_params():,} parameters, {options.dtype}, "
        f"{size / 1e6:.1f} MB\n"
        f"use: {shlex.join(words)}, or {_call(options.model, str(folder), given)}\n"
    )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder beside this one, and its name when all is written: half of it helps nobody.

    Raises:
        ValueError: If there is something already, or no folder can be made there.
    """
    if folder.exists():
        raise ValueError(
            f"--output must be a new folder, got {folder}, which exists. Remove it or choose "
            "another."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-")
    except OSError as error:
        raise ValueError(
            f"--output must be a new folder, got {folder}, which cannot be made: {error}."
        ) from error
    with scratch as name:
        unfinished = Path(name, folder.name)
        yield unfinished
        unfinished.rename(folder)


def _call(name: str, folder: str, given: Mapping[str, Any]) -> str:
    """The call that loads the weights, with the options that they needed."""
    return f"create_model({name!r}, {as_arguments({'pretrained': folder, **given})})"


def _card(options: argparse.Namespace, model: ZooModel, given: Mapping[str, Any]) -> str:
    """What is known of the weights; the licence where they are published ones."""
    name, source = options.model, options.pretrained
    published = next((own for own in find_model(name).weights if own.tag == source), None)
    lines = ["---", "library_name: longnet_zoo"]
    lines += [] if published is None else [f"license: {published.licence.lower()}"]
    origin = f"`{source}`" if published is None else f"`{source}` ({published.location})"
    lines += [
        "---",
        "",
        f"# {name}",
        "",
        f"{type(model).__name__} with {model.num_params():,} parameters, {options.dtype}, exported "
        f"from {origin}.",
        "",
        "    import longnet_zoo as lz",
        f"    model = lz.{_call(name, 'FOLDER', given)}",
        "",
    ]
    return "\n".join(lines)
