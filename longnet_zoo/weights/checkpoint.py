"""Reading the weights of one model out of files and of what training checkpoints hold."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["WEIGHT_SUFFIXES", "Checkpoint", "read_checkpoint", "read_state_dict", "unwrap"]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# What training checkpoints call their weights, the first one with content wins: Lightning, most
# projects, DINO (whose file has a student as well), DeepSpeed.
_CONTAINERS = ("state_dict", "model", "teacher", "module")
# What wrappers put before every name: DistributedDataParallel, Lightning, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# The parts of what the recipe for slides trains: an encoder, and a linear head beside it.
_ENCODER, _HEAD = "encoder.", "head."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one model, and how a recipe made that model.

    Attributes:
        state_dict: Tensors by name, without the prefixes of wrappers.
        model_name: Name in the registry; None where no recipe has written the checkpoint.
        model_options: Options that the recipe gave it.
    """

    state_dict: dict[str, Tensor]
    model_name: str | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the weights of one model from a file, onto the CPU.

    A training checkpoint gives the weights of its model: what it holds under `"state_dict"`,
    `"model"`, `"teacher"` or `"module"`, without the prefixes that wrappers put before all names.
    One of the recipe for slides gives its encoder; the linear head beside it is left out. Files are
    never unpickled beyond tensors, plain containers and the `argparse.Namespace` in which
    checkpoints keep their options.

    Args:
        path: A `.safetensors`, `.pth`, `.pt`, `.bin` or `.ckpt` file.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is another one, the file is damaged or holds something else.
    """
    return read_checkpoint(path).state_dict


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a file as `read_state_dict`, with what a recipe has written about its model."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"weights must be in a local file ({', '.join(WEIGHT_SUFFIXES)}), got {str(path)!r}, "
            f"which {kind}."
        )
    if path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"weights must be a file ending in {WEIGHT_SUFFIXES}, got {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files fail in a dozen ways, deep inside the readers.
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"cannot read weights from {str(path)!r}: {type(error).__name__}: {reason} "
            "The file is damaged, or holds more than tensors: save a plain state dict."
        ) from error
    return unwrap(content, source=repr(str(path)))


def unwrap(content: Any, *, source: str) -> Checkpoint:
    """Takes the weights of one model out of a training checkpoint, or a state dict as it is.

    Args:
        content: What was read.
        source: What to call it in an error.

    Raises:
        ValueError: If it is no mapping of names to tensors and holds none.
    """
    weights = _without_prefixes(_without_containers(content))
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"weights must be a mapping of names to tensors, {source} holds a "
            f"{type(weights).__name__}."
        )
    others = [key for key, x in weights.items() if not (isinstance(key, str) and _has_data(x))]
    if others or not weights:
        found = f"the entries {others} are not" if others else "it is empty"
        raise ValueError(
            f"weights must be a mapping of names to tensors with data, in {source} {found}. If the "
            "weights are inside one of them, pass that state dict."
        )
    name, options = _recipe_model(content)
    if name is not None and all(key.startswith((_ENCODER, _HEAD)) for key in weights):
        weights = {
            key.removeprefix(_ENCODER): x for key, x in weights.items() if key.startswith(_ENCODER)
        }
    return Checkpoint(state_dict=dict(weights), model_name=name, model_options=options)


def _has_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def _recipe_model(content: Any) -> tuple[str | None, Mapping[str, Any]]:
    """Name and options of the model in the checkpoint of a recipe; no name in others."""
    settings = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if not isinstance(settings, Mapping):
        return None, {}
    name, options = settings.get("model_name"), settings.get("model_options", False)
    if not isinstance(name, str) or not isinstance(options, Mapping | None):
        return None, {}
    return name, dict(options or {})


def _without_containers(content: Any) -> Any:
    while isinstance(content, Mapping):
        inside = [content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        content = next(filter(None, inside), inside[0])
    return content


def _without_prefixes(content: Any) -> Any:
    while isinstance(content, Mapping) and content:
        prefix = next((x for x in _PREFIXES if all(str(key).startswith(x) for key in content)), "")
        if not prefix:
            break
        content = {str(key).removeprefix(prefix): value for key, value in content.items()}
    return content
