"""What `longnet-zoo export` does: weights from anywhere, as a folder that everything here loads."""

from __future__ import annotations

import argparse
import sys
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
    if folder.exists():
        raise ValueError(
            f"--output must be a new folder, got {folder}, which exists. Remove it or choose "
            "another."
        )
    given = read_options(options.option)
    model = create_model(options.model, pretrained=options.pretrained, **given)
    assert isinstance(model, ZooModel)
    model.to(getattr(torch, options.dtype))
    model.save_pretrained(folder)
    (folder / "README.md").write_text(_card(options, model), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    sys.stdout.write(
        f"{folder}: {type(model).__name__}, {model.num_params():,} parameters, {options.dtype}, "
        f"{size / 1e6:.1f} MB\nuse: --pretrained {folder}, or "
        f"create_model({options.model!r}, pretrained={str(folder)!r})\n"
    )


def _card(options: argparse.Namespace, model: ZooModel) -> str:
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
        f'    model = lz.create_model("{name}", pretrained="FOLDER")',
        "",
    ]
    return "\n".join(lines)
