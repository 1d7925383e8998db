"""Reading weights from files and loading them strictly."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["WEIGHT_SUFFIXES", "load_state_dict", "read_state_dict"]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# What training checkpoints call their weights, the first found wins: Lightning, most projects,
# DINO (whose file has a student as well), DeepSpeed.
_CONTAINERS = ("state_dict", "model", "teacher", "module")
# What wrappers put before every name: DistributedDataParallel, Lightning, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# How the names of heads begin, and the options that size them.
_HEADS = {"head", "fc_norm", "classifier"}
_HEAD_OPTIONS = ("num_classes", "num_outputs")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the weights of one model from a file, onto the CPU.

    A training checkpoint gives the weights of its model: what it holds under `"state_dict"`,
    `"model"`, `"teacher"` or `"module"`, without the prefixes that wrappers put before all names.
    Files are never unpickled beyond tensors, plain containers and the `argparse.Namespace` in which
    checkpoints keep their options.

    Args:
        path: A `.safetensors`, `.pth`, `.pt`, `.bin` or `.ckpt` file.

    Returns:
        Tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is another one, the file is damaged or holds something else.
    """
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
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        listed = (
            f"{len(keys)} {kind} ({', '.join(keys)})" for kind, keys in problems.items() if keys
        )
        raise ValueError(
            f"{source} does not fit {type(model).__name__}; keys: {'; '.join(listed)}. "
            + _cure(model, state_dict, [*missing, *unexpected, *misshaped])
        )
    model.load_state_dict(dict(state_dict))


def _cure(model: nn.Module, state_dict: Mapping[str, Tensor], keys: Iterable[str]) -> str:
    config = getattr(model, "config", None)
    option = next((name for name in _HEAD_OPTIONS if hasattr(config, name)), None)
    if option is None or all(key.split(".")[0] not in _HEADS for key in keys):
        return "Create the model with the options that the weights were trained with."
    # The last matrix of a head makes the logits.
    sizes = [
        len(state_dict[key])
        for key in sorted(state_dict)
        if key.split(".")[0] in _HEADS and "head" in key.split(".") and state_dict[key].ndim == 2
    ]
    return (
        f"The head differs: create the model with {option}={sizes[-1] if sizes else 0} as in the "
        "weights, then call reset_classifier(n) for a new head of n outputs. Other keys: create it "
        "with the options that the weights were trained with."
    )


def _plain_state_dict(content: Any, path: str) -> dict[str, Tensor]:
    content = _without_prefixes(_without_containers(content))
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


def _without_containers(content: Any) -> Any:
    while isinstance(content, Mapping):
        inside = (content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping))
        inner = next(inside, None)
        if inner is None:
            break
        content = inner
    return content


def _without_prefixes(content: Any) -> Any:
    while isinstance(content, Mapping) and content:
        prefix = next((x for x in _PREFIXES if all(str(key).startswith(x) for key in content)), "")
        if not prefix:
            break
        content = {str(key).removeprefix(prefix): value for key, value in content.items()}
    return content
