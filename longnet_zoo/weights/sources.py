"""What `create_model(pretrained=...)` takes: weights are found, checked and read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants
from torch import Tensor

from longnet_zoo.registry import (
    SHIPPED_PREFIX,
    ModelEntry,
    PublishedWeights,
    registered_models,
)

from .checkpoint import WEIGHT_SUFFIXES, Checkpoint, read_checkpoint, unwrap
from .download import DownloadOptions, check_digest, download_url
from .hub import HUB_PREFIX, HubLocation, cached_sha256, download_hub, parse_hub_location

__all__ = ["FoundWeights", "Pretrained", "find_weights"]

Pretrained = bool | str | os.PathLike[str] | Mapping[str, Tensor]

# Weights that come with this package: folders that `save_pretrained` wrote.
_SHIPPED = Path(__file__).parent / "shipped"

_HUB_FILES = (constants.SAFETENSORS_SINGLE_FILE, constants.PYTORCH_WEIGHTS_NAME)
_DOWNLOAD = tuple(option.name for option in fields(DownloadOptions))
_FORMS = (
    "True, a tag, the path of a weights file or of a folder that save_pretrained wrote, "
    f"'{HUB_PREFIX}owner/name[@revision][/file]', the https:// address of a file, or a state dict"
)


@dataclass(frozen=True, kw_only=True)
class FoundWeights:
    """Weights that were found and read.

    Attributes:
        state_dict: Tensors by the names that they were saved with.
        source: What to call them in an error.
        config: Content of the `config.json` beside them; None where there is none.
        options: Options of the model that they are registered with, or that the recipe had.
    """

    state_dict: Mapping[str, Tensor]
    source: str
    config: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Local files that a place stands for.

    Attributes:
        weights: The weights.
        config: The `config.json` beside them.
        sha256: The digest that the weights must have.
        is_download: Whether they were downloaded.
        is_file: Whether the weights were asked for by the name of their file, so that the config of
            another library beside them does not count.
    """

    weights: Path
    config: Path | None = None
    sha256: str | None = None
    is_download: bool = False
    is_file: bool = False


def find_weights(
    entry: ModelEntry, pretrained: Pretrained, options: DownloadOptions
) -> FoundWeights | None:
    """Finds and reads the weights that `pretrained` asks for.

    Args:
        entry: The model they are for.
        pretrained: As for `create_model`.
        options: How to download.

    Returns:
        The weights; None for `pretrained=False`.

    Raises:
        ValueError: If no weights are published, it is not clear which file is meant, a digest or a
            file is wrong, or an option does not apply to this source.
        TypeError: If `pretrained` is something else.
        FileNotFoundError: If there is nothing where they should be.
        PermissionError: If they are in a gated repository.
        ConnectionError: If they cannot be downloaded.
    """
    if pretrained is False or isinstance(pretrained, Mapping):
        _refuse(options, *_DOWNLOAD, source=f"pretrained={_name(pretrained)}")
        if pretrained is False:
            return None
        source = "the state dict"
        checkpoint = unwrap(pretrained, source=source)
        return FoundWeights(
            state_dict=checkpoint.state_dict,
            source=source,
            options=_recipe_options(entry, checkpoint, source),
        )
    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise TypeError(f"pretrained must be {_FORMS}, got {_name(pretrained)}.")
    published = _registered(entry, pretrained)
    location = str(pretrained) if published is None else published.location
    files = _locate(location, options)
    if files is None:
        tags = ", ".join(repr(weights.tag) for weights in entry.weights) or "none"
        raise FileNotFoundError(
            f"pretrained={location!r} does not exist: it is no tag of the weights of "
            f"{entry.name!r} (tags: {tags}), no file and no folder. pretrained must be {_FORMS}."
        )
    source = repr(location)
    if published is not None or files.is_download:
        registered = None if published is None else published.sha256
        check_digest(files.weights, registered or files.sha256, source=source)
    checkpoint = read_checkpoint(files.weights)
    registered_options = {} if published is None else published.options
    return FoundWeights(
        state_dict=checkpoint.state_dict,
        source=source,
        config=_config_beside(files),
        options={**_recipe_options(entry, checkpoint, source), **registered_options},
    )


def _recipe_options(entry: ModelEntry, checkpoint: Checkpoint, source: str) -> dict[str, Any]:
    """All options of the model that a recipe has trained; none for other checkpoints."""
    if checkpoint.model_name not in {known.name for known in registered_models()}:
        return {}
    if checkpoint.model_name != entry.name:
        raise ValueError(
            f"{source} must be a checkpoint of the model {entry.name!r}, got one of "
            f"{checkpoint.model_name!r}. Create that model, or pass the state dict inside and "
            "the options that go with it."
        )
    defaults = {field.name: getattr(entry.config, field.name) for field in fields(entry.config)}
    return {**defaults, **checkpoint.model_options}


def _registered(
    entry: ModelEntry, pretrained: bool | str | os.PathLike[str]
) -> PublishedWeights | None:
    if pretrained is not True:
        return next((weights for weights in entry.weights if weights.tag == pretrained), None)
    if not entry.weights:
        raise ValueError(
            f"no weights are published for {entry.name!r}. Pass pretrained=False, or your own: the "
            "path of a file or folder, or a state dict."
        )
    return entry.weights[0]


def _locate(location: str, options: DownloadOptions) -> _Files | None:
    """Finds, and downloads if need be, what a location names; None if it names nothing."""
    if location.startswith(HUB_PREFIX):
        return _locate_in_hub(parse_hub_location(location, options.revision), options)
    if location.startswith(("https://", "http://")):
        _refuse(options, "revision", "token", source=repr(location))
        _check_suffix(urlsplit(location).path)
        return _Files(weights=download_url(location, options), is_download=True)
    if location.startswith(SHIPPED_PREFIX):
        # Neither a cache nor a wish to stay offline is wrong for weights that are here.
        _refuse(options, "revision", "token", source=repr(location))
        path = _SHIPPED / location.removeprefix(SHIPPED_PREFIX)
    else:
        _refuse(options, *_DOWNLOAD, source=repr(location))
        path = Path(location).expanduser()
    if not location or not path.exists():
        return None
    if path.is_dir():
        return _locate_in_folder(path)
    config = path.with_name(constants.CONFIG_NAME)
    is_saved = path.name == constants.SAFETENSORS_SINGLE_FILE and config.is_file()
    return _Files(weights=path, config=config if is_saved else None, is_file=True)


def _locate_in_hub(location: HubLocation, options: DownloadOptions) -> _Files:
    config = None
    names: tuple[str, ...] = _HUB_FILES
    if location.filename is None:
        config = download_hub(location, constants.CONFIG_NAME, options)
    else:
        names = (location.filename,)
        _check_suffix(location.filename)
        place = PurePosixPath(location.filename)
        if place.name == constants.SAFETENSORS_SINGLE_FILE:
            beside = str(place.with_name(constants.CONFIG_NAME))
            config = download_hub(location, beside, options)
    for name in names:
        path = download_hub(location, name, options)
        if path is not None:
            return _Files(
                weights=path,
                config=config,
                sha256=cached_sha256(path),
                is_download=True,
                is_file=location.filename is not None,
            )
    raise FileNotFoundError(
        f"{location} has no {' and no '.join(names)}. Name the file that it has: "
        f"'{location}/FILE'; {constants.ENDPOINT}/{location.repo_id}/tree/"
        f"{location.revision or constants.DEFAULT_REVISION} lists them."
    )


def _locate_in_folder(folder: Path) -> _Files:
    config = folder / constants.CONFIG_NAME
    saved = folder / constants.SAFETENSORS_SINGLE_FILE
    if config.is_file() and saved.is_file():
        return _Files(weights=saved, config=config)
    found = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"the folder {str(folder)!r} must have a weights file ({', '.join(WEIGHT_SUFFIXES)}), "
            "got none. Pass a folder that save_pretrained wrote, or the path of a file."
        )
    if len(found) > 1:
        raise ValueError(
            f"the folder {str(folder)!r} must have one weights file, got {len(found)}: "
            f"{', '.join(path.name for path in found)}. Pass the path of the one that is meant."
        )
    return _Files(weights=found[0], config=config if config.is_file() else None)


def _config_beside(files: _Files) -> Mapping[str, Any] | None:
    if files.config is None:
        return None
    content = _read_config(files.config)
    is_ours = isinstance(content.get("model"), str)
    return content if is_ours or not files.is_file else None


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON, got: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {_name(content)}.")
    return content


def _check_suffix(name: str) -> None:
    if Path(name).suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"weights must be a file ending in {WEIGHT_SUFFIXES}, got {name!r}.")


def _refuse(options: DownloadOptions, *names: str, source: str) -> None:
    """Refuses options of a download where they are without use."""
    for name in names:
        value = getattr(options, name)
        if value != getattr(DownloadOptions(), name):
            shown = "..." if name == "token" else repr(value)  # a secret stays out of logs
            raise ValueError(
                f"{name} is for weights on the Hub ('{HUB_PREFIX}owner/name')"
                f"{'' if name in ('revision', 'token') else ' or at an https:// address'}, got "
                f"{name}={shown} with {source}. Leave it out."
            )


def _name(value: object) -> str:
    return repr(value) if isinstance(value, bool) else type(value).__name__
