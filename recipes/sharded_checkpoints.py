r"""Checkpoints that many processes write together, each its share: folders instead of files.

    runs/NAME/checkpoints/last.ckpt/
      __0_0.distcp, ...   weights and optimizer states, as torch.distributed.checkpoint writes them
      .metadata           what lies where
      meta.pt             everything else of a Lightning checkpoint

Such a folder resumes on any number of processes, `--ckpt_path` takes it for one device too. For
`create_model(pretrained=...)` and other programmes, make it one file:

    python -m recipes.sharded_checkpoints runs/NAME/checkpoints/last.ckpt weights.ckpt

Like `pickle` these folders can run code when they are read: read only those that you trust.
"""

import argparse
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

__all__ = [
    "FolderCheckpointIO",
    "by_index",
    "by_name",
    "is_sharded",
    "main",
    "read_folder",
    "replace_folder",
]

_META = "meta.pt"


class FolderCheckpointIO(TorchCheckpointIO):
    """Lets a trainer without sharded weights, such as one of a single device, load folders."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a file, or a folder as if it was one."""
        if is_sharded(path):
            return read_folder(path)
        return super().load_checkpoint(path, map_location, weights_only)


def is_sharded(path: str | Path) -> bool:
    """Returns whether a path is the folder of a complete sharded checkpoint."""
    return Path(path, _META).is_file()


def read_folder(folder: str | Path, *, with_tensors: bool = True) -> dict[str, Any]:
    """Reads a sharded checkpoint as the dict that one process would have written.

    Args:
        folder: The folder.
        with_tensors: False reads no tensors and no optimizer states: the weights under
            "state_dict" then have shape and dtype only.

    Raises:
        ValueError: A file with tensors is missing or too short; damage elsewhere raises what
            PyTorch raises.
    """
    checkpoint = torch.load(Path(folder, _META), map_location="cpu", weights_only=True)
    metadata = dcp.FileSystemReader(folder).read_metadata()
    _check_files(folder, metadata)
    entries = metadata.state_dict_metadata
    paths = metadata.planner_data
    if not with_tensors:
        entries = {key: entry for key, entry in entries.items() if paths[key][0] == "state_dict"}
    flat = {
        key: torch.empty(
            entry.size, dtype=entry.properties.dtype, device="cpu" if with_tensors else "meta"
        )
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in entries.items()
    }
    if with_tensors:
        with warnings.catch_warnings():
            # Of being the only process, which `no_dist` asks for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(flat, checkpoint_id=folder, no_dist=True)
    nested = _nested(flat, paths)
    checkpoint["state_dict"] = nested.pop("state_dict")
    if with_tensors:
        states = [nested[f"optimizer_{number}"] for number in range(len(nested))]
        checkpoint["optimizer_states"] = [by_index(state) for state in states]
    return checkpoint


def _check_files(folder: str | Path, metadata: Metadata) -> None:
    """Checks that the files with tensors are there, and as long as the metadata says."""
    sizes: dict[str, int] = {}
    for place in metadata.storage_data.values():
        end = place.offset + place.length
        sizes[place.relative_path] = max(end, sizes.get(place.relative_path, 0))
    for name, size in sizes.items():
        path = Path(folder, name)
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        if not path.is_file() or path.stat().st_size < size:
            raise ValueError(
                f"{name} must have {size:,} bytes, got {found}. Copy the whole folder again, or "
                "use another checkpoint."
            )


def by_index(state: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers the parameters in an optimizer's state, which goes by names, as PyTorch does.

    Args:
        state: "state" by name of a parameter, and "param_groups" with the names.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return _renamed(state, numbers)


def by_name(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module
) -> dict[str, Any]:
    """Names the parameters in a state that PyTorch has numbered.

    Args:
        state: What `Optimizer.state_dict` returned.
        optimizer: The optimizer it is for; its groups are in the order of the state's.
        module: Names its parameters.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    ordered = [
        names[parameter] for group in optimizer.param_groups for parameter in group["params"]
    ]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    return _renamed(state, dict(zip(numbers, ordered, strict=True)))


def replace_folder(old: Path, new: Path) -> None:
    """Puts a complete folder in the place of another one, of which a kill leaves one or both.

    Args:
        old: Place of the checkpoint, `NAME.ckpt`; in between it is called `NAME-before.ckpt`.
        new: The folder that takes the place.
    """
    before, gone = old.with_name(f"{old.stem}-before{old.suffix}"), old.with_suffix(".gone")
    shutil.rmtree(gone, ignore_errors=True)
    if old.is_dir():
        shutil.rmtree(before, ignore_errors=True)
        old.rename(before)
    elif old.exists():
        old.unlink()
    new.rename(old)
    if before.exists():
        # Half of a checkpoint must not look like one.
        before.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _nested(flat: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> Any:
    """Puts values into dicts of dicts, and into lists where their paths have numbers."""
    tree: dict[Any, Any] = {}
    for key, value in flat.items():
        node = tree
        for step in paths[key][:-1]:
            node = node.setdefault(step, {})
        node[paths[key][-1]] = value
    return _with_lists(tree)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inner = {key: _with_lists(value) for key, value in node.items()}
    is_list = bool(inner) and all(isinstance(key, int) for key in inner)
    return [inner[place] for place in sorted(inner)] if is_list else inner


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Makes one file of a sharded checkpoint.")
    parser.add_argument("folder", type=Path, help="checkpoint to read, such as last.ckpt")
    parser.add_argument("file", type=Path, help="file to write, ending in .ckpt")
    options = parser.parse_args(args)
    if not is_sharded(options.folder):
        parser.error(f"{options.folder} is no folder of a complete checkpoint: it has no {_META}")
    if options.file.exists():
        parser.error(f"{options.file} exists; pass another name, or delete it first")
    try:
        checkpoint = read_folder(options.folder)
    # Damage shows itself as RuntimeError, UnpicklingError, EOFError, KeyError and more.
    except Exception as error:
        parser.error(f"{options.folder} is damaged: {error or type(error).__name__}")
    try:
        torch.save(checkpoint, options.file)
    except (OSError, RuntimeError) as error:
        options.file.unlink(missing_ok=True)
        parser.error(f"{options.file} cannot be written: {error}")


if __name__ == "__main__":
    main()
