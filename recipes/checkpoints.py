"""Looks into a checkpoint before a run starts, so that a bad one is one clear error."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from longnet_zoo.registry import find_model, registered_models
from recipes.sharded_checkpoints import is_sharded, read_folder

__all__ = [
    "check_checkpoint",
    "check_settings",
    "check_state_dict",
    "last_checkpoint",
    "read_checkpoint",
]

_LISTED = 8

# Options of a model that change neither its weights nor what it computes in an evaluation.
_FREE_OPTIONS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "head_dropout",
    "drop_path",
    "backend",
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Opens a Lightning checkpoint without reading its tensors into memory.

    Args:
        path: A local file, or the folder of a sharded checkpoint.

    Returns:
        The checkpoint; its tensors stay in the file until they are used. Of a folder they have
        shape and dtype only.

    Raises:
        ValueError: There is no such file, it is damaged, or it is no Lightning checkpoint.
    """
    is_folder = is_sharded(path)
    if not (Path(path).is_file() or is_folder):
        raise ValueError(
            "the checkpoint must be an existing file, or the complete folder of a sharded one, got "
            f"ckpt_path={str(path)!r}. Look into {_absolute_parent(path)}, or pass ckpt_path=last "
            "for the newest of this run."
        )
    try:
        if is_folder:
            checkpoint = read_folder(path, with_tensors=False)
        else:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    # Damage shows itself as RuntimeError, UnpicklingError, EOFError, KeyError and more.
    except Exception as error:
        reason = str(error).strip().splitlines()
        size = "a folder" if is_folder else f"{os.path.getsize(path):,} bytes"
        raise ValueError(
            f"the checkpoint {path} is damaged, or no checkpoint at all "
            f"({size}; {reason[0] if reason else type(error).__name__}). "
            "Resume from another one, or start again without ckpt_path."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint)
        raise ValueError(
            f"a Lightning checkpoint holds 'state_dict', got {_listed(found)} in {path}. Pass a "
            "file that a recipe wrote."
        )
    return checkpoint


def check_checkpoint(task: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Compares a checkpoint that Lightning is about to load with the task it is for.

    Args:
        task: A task with the attribute `optimization`, an `OptimizationConfig`.
        checkpoint: The content of the checkpoint.

    Raises:
        ValueError: The model differs, or the optimizer of a run that is resumed; the message says
            in what.
    """
    # From Python, `load_from_checkpoint` takes other options on purpose.
    if task._trainer is not None:
        check_settings(task.hparams, checkpoint.get("hyper_parameters", {}))
    # Sharded checkpoints are read piece by piece later.
    if "state_dict" in checkpoint:
        check_state_dict(task.state_dict(), checkpoint["state_dict"])
    if task._trainer is not None and task.trainer.state.fn == "fit":
        task.optimization.check_resumed(checkpoint["hyper_parameters"]["optimization"])


def check_settings(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compares the model of a configuration with that of a checkpoint.

    The shapes of the weights say little: attention patterns, pooling and the layers that a head
    reads change what is computed, and no shape.

    Args:
        settings: `model_name`, `model_options` and, where the task has them, `num_classes` and
            `layers`.
        saved: The hyperparameters of the checkpoint.

    Raises:
        ValueError: They differ; the message lists each setting with both values.
    """
    if saved.get("model_name") is None:
        return
    if settings["model_name"] == saved["model_name"]:
        mine, theirs = _flat_settings(settings), _flat_settings(saved)
    else:
        # The options of two models cannot be compared.
        mine, theirs = settings, {"model_name": saved["model_name"]}
    differing = [key for key in theirs if key in mine and mine[key] != theirs[key]]
    if differing:
        got, trained = (
            ", ".join(f"{key}={_shown(values[key])}" for key in differing)
            for values in (mine, theirs)
        )
        raise ValueError(
            f"a checkpoint goes on as the model that was trained, got {got} and a checkpoint of "
            f"{trained}. Set model.{differing[0]} to {_shown(theirs[differing[0]])}"
            f"{' and so on' if len(differing) > 1 else ''}, or use another checkpoint."
        )


def check_state_dict(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Compares the names and shapes of a checkpoint's weights with those of the model.

    Args:
        expected: State dict of the model.
        got: State dict of the checkpoint.

    Raises:
        ValueError: They differ; the message lists missing, unexpected and mis-shaped keys.
    """
    missing = [key for key in expected if key not in got]
    unexpected = [key for key in got if key not in expected]
    shapes = [
        f"{key}: model {tuple(expected[key].shape)}, checkpoint {tuple(got[key].shape)}"
        for key in expected
        if key in got and expected[key].shape != got[key].shape
    ]
    problems = [
        f"{len(keys)} {kind}: {_listed(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if keys
    ]
    if problems:
        raise ValueError(
            "the checkpoint is of another model than the configuration: "
            + "; ".join(problems)
            + ". Use the model_name and model_options it was trained with, or another checkpoint."
        )


def last_checkpoint(run_dir: str | Path) -> Path | None:
    """Returns the newest `checkpoints/last*.ckpt` of a run, or None if there is none."""
    found = Path(run_dir, "checkpoints").glob("last*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what makes a model the one it is, with the options that nobody gave."""
    name = settings["model_name"]
    options = dict(settings.get("model_options") or {})
    if name in {entry.name for entry in registered_models()}:
        default = find_model(name).config
        # Unknown options are refused by the model. The config writes the others in one way.
        known = {field.name for field in dataclasses.fields(default)} & options.keys()
        options = default.changed({key: options[key] for key in known}).options()
    # The recipes keep the number of classes by themselves.
    for key in (*_FREE_OPTIONS, "num_classes"):
        options.pop(key, None)
    flat = {
        key: settings[key] for key in ("model_name", "num_classes", "layers") if key in settings
    }
    return flat | {f"model_options.{key}": value for key, value in options.items()}


def _shown(value: Any) -> str:
    """Returns a value as one writes it on the command line."""
    if value is None:
        return "null"
    return repr(list(value) if isinstance(value, tuple) else value)


def _listed(keys: Any) -> str:
    """Returns the first keys and how many more there are."""
    if not isinstance(keys, list):
        return str(keys)
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _absolute_parent(path: str | Path) -> Path:
    return Path(path).expanduser().resolve().parent
