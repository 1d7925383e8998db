"""Reading weights from files and loading them strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["load_state_dict", "read_state_dict"]

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_CHECKPOINT_KEY = "state_dict"
_CHECKPOINT_PREFIX = "model."


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the weights of one model from a file, onto the CPU.

    A training checkpoint (a file that holds its weights under `"state_dict"`, named `model.*`)
    gives the weights of its model. Files are never unpickled beyond plain tensors and containers.

    Args:
        path: A `.safetensors`, `.pth`, `.pt`, `.bin` or `.ckpt` file.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is another one, the file is damaged or holds something else.
    """
    path = Path(path)
    suffixes = (".safetensors", *_TORCH_SUFFIXES)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"weights must be in a local file ({', '.join(suffixes)}), got {str(path)!r}, which "
            f"{kind}."
        )
    if path.suffix not in suffixes:
        raise ValueError(f"weights must be a file ending in {suffixes}, got {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files fail in a dozen ways, deep inside the readers.
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"cannot read weights from {str(path)!r}: {type(error).__name__}: {reason} "
            "The file is damaged, or holds more than tensors: save a plain state dict."
        ) from error
    return _plain_state_dict(content, str(path))


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str = "the state dict"
) -> None:
    """Loads weights into a model; every key must be there and fit, or nothing is changed.

    Args:
        model: The model.
        state_dict: Tensors by name.
        source: What to call the state dict in an error.

    Raises:
        ValueError: If keys are missing, unexpected or of another shape, or a value is no tensor;
            the message has all.
    """
    others = sorted(str(key) for key, x in state_dict.items() if not isinstance(x, Tensor))
    if others:
        raise ValueError(
            f"{source} must map names to tensors, got something else at {', '.join(others)}."
        )
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - wanted.keys())
    misshaped = [
        f"{key}: {tuple(state_dict[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state_dict.keys())
        if state_dict[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys)})"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}; keys: {'; '.join(problems)}. "
            "Create the model with the options that the weights were trained with."
        )
    model.load_state_dict(dict(state_dict))


def _plain_state_dict(content: Any, path: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get(_CHECKPOINT_KEY), Mapping):
        content = content[_CHECKPOINT_KEY]
        if all(str(key).startswith(_CHECKPOINT_PREFIX) for key in content):
            content = {key.removeprefix(_CHECKPOINT_PREFIX): x for key, x in content.items()}
    if not isinstance(content, Mapping):
        raise ValueError(
            f"weights must be a mapping of names to tensors, {path!r} holds a "
            f"{type(content).__name__}."
        )
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        found = f"the entries {others} are not" if others else "it is empty"
        raise ValueError(
            f"weights must be a mapping of names to tensors, in {path!r} {found}. If the weights "
            "are inside one of them, read the file with torch.load and pass that state dict."
        )
    return dict(content)
