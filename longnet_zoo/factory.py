"""Making, listing and describing models by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from longnet_zoo.models import ZooConfig, config_from_json  # registers every model
from longnet_zoo.models.base import warn_of_other_rules
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.registry import (
    ModelEntry,
    PublishedWeights,
    find_model,
    nearest_names,
    registered_models,
)
from longnet_zoo.weights import (
    CONVERTERS,
    DownloadOptions,
    FoundWeights,
    Pretrained,
    find_weights,
    load_state_dict,
    options_of_names,
)
from longnet_zoo.weights.keys import as_arguments

__all__ = ["ModelInfo", "create_model", "list_models", "model_info"]

# What tells models of one family apart: a folder with others is hardly the model of that name.
_SIZES = ("embed_dim", "num_layers", "num_heads")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a registered model without making it.

    Attributes:
        name: Its name.
        family: Models of one family share a class and a config class.
        modality: What it reads.
        description: One line for people.
        source: The paper or code its sizes come from.
        config: Its default config.
        num_params: Number of parameters, tied ones once.
        seq_len: The length that `flops` is for.
        flops: FLOPs of a forward pass over one sequence of `seq_len`, a multiply-add as two.
        pattern: Its attention pattern, with the segment lengths that the config gives.
        weights: Its published weights, the default ones first; empty where there are none.
        published_options: Options that weights under published names bring, where a new model has
            others; the `options` of `weights` come on top.
    """

    name: str
    family: str
    modality: str
    description: str
    source: str
    config: Any
    num_params: int
    seq_len: int
    flops: int
    pattern: DilatedPattern
    weights: tuple[PublishedWeights, ...]
    published_options: Mapping[str, Any]


def create_model(
    name: str,
    *,
    pretrained: Pretrained = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> nn.Module:
    """Makes a registered model.

    Weights are loaded strictly: a model comes back with all of them or not at all. Published names
    are translated, and the options that such weights were trained with become the defaults. So do
    the options in a checkpoint of a recipe; that of the recipe for slides gives the encoder,
    without the linear head that was trained beside it. A plain file under our own names says
    nothing of these options: where none of them is passed, a warning is logged.

    Args:
        name: A name of `list_models()`.
        pretrained: Where its weights come from. False: initial values. True: the published
            weights; a tag of `model_info(name).weights`: those. The path of a `.safetensors`,
            `.pth`, `.pt`, `.bin` or `.ckpt` file, or of a folder that `save_pretrained` wrote, or
            its `model.safetensors`: the config there gives the defaults.
            `"hf_hub:owner/name[@revision][/file]"`: a repository or a file on the Hugging Face Hub.
            The `https://` address of a file. Or a state dict.
        revision: Branch, tag or commit on the Hub. This and what follows is refused for sources
            that it is without use for.
        cache_dir: Folder for what is downloaded; None: the cache of huggingface_hub or torch.hub.
        token: Token for the Hub; None: the one of `hf auth login`.
        local_files_only: Whether to take only what was downloaded before, as with
            `HF_HUB_OFFLINE=1`.
        **options: Fields of the model's config that differ from its defaults. For a part that has
            a config of its own, a mapping with what differs there: `image={"img_size": 128}`.
            Where saved weights say what they were trained with, a warning names options that fit
            them but make another model, such as `position`; the attention pattern is free.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If the name is unknown, an option has a bad value, weights do not fit, are
            those of a model of another size or have another digest, or there are none published.
        TypeError: If an option is unknown or of the wrong type.
        FileNotFoundError: If there is nothing where the weights should be.
        PermissionError: If they are in a gated repository.
        ConnectionError: If they cannot be downloaded.

    Example:
        >>> model = create_model("longnet_lm_tiny", vocab_size=1000, num_layers=2)
        >>> logits = model(torch.randint(1000, (1, 4096)))
    """
    entry = find_model(name)
    _check_names(name, entry.config, options)
    download = DownloadOptions(
        revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    weights = find_weights(entry, pretrained, download)
    if weights is None:
        return entry.build(entry.config.changed(options))
    return _build_with(entry, weights, options)


def list_models(
    pattern: str = "*",
    *,
    modality: str | None = None,
    family: str | None = None,
    pretrained: bool | None = None,
) -> list[str]:
    """Lists the names of registered models, sorted.

    Args:
        pattern: Shell-style pattern on the name, such as `"*slide*"`.
        modality: Keep only this modality, such as `"text"`.
        family: Keep only this family.
        pretrained: Keep only models with (True) or without (False) published weights.

    Returns:
        Names; an empty list where nothing matches.

    Raises:
        ValueError: If there is no such modality or family.
    """
    found = registered_models(pattern, modality=modality, family=family, pretrained=pretrained)
    return [entry.name for entry in found]


def model_info(name: str, seq_len: int | None = None) -> ModelInfo:
    """Describes a registered model; no memory is taken for its weights.

    Args:
        name: A name of `list_models()`.
        seq_len: Length to count FLOPs for; None: what is usual for the model.

    Returns:
        Config, number of parameters, FLOPs, source and published weights.

    Raises:
        ValueError: If the name is unknown or `seq_len` is below 1.
    """
    entry = find_model(name)
    if seq_len is None:
        seq_len = entry.config.usual_seq_len
    if type(seq_len) is not int or seq_len < 1:
        raise ValueError(f"seq_len must be an integer of at least 1, got {seq_len!r}.")
    model = _build_empty(entry)
    return ModelInfo(
        name=name,
        family=entry.family,
        modality=entry.modality,
        description=entry.description,
        source=entry.source,
        config=entry.config,
        num_params=model.num_params(),
        seq_len=seq_len,
        flops=model.flops(seq_len),
        pattern=entry.config.pattern,
        weights=entry.weights,
        published_options=_published_options(entry),
    )


def _check_names(name: str, config: ZooConfig, options: Mapping[str, Any]) -> None:
    valid = [field.name for field in fields(config)]
    for option, value in options.items():
        if option not in valid:
            near = nearest_names(option, valid)
            cure = f"Did you mean {near}? " if near else ""
            raise TypeError(f"{name} has no option {option!r}. {cure}Options: {', '.join(valid)}.")
        part = getattr(config, option)
        if isinstance(value, Mapping) and isinstance(part, ZooConfig):
            _check_names(f"{option} of {name}", part, value)


def _build_with(entry: ModelEntry, weights: FoundWeights, options: Mapping[str, Any]) -> nn.Module:
    """Makes a model with weights; what the user asks for wins over what they were trained with."""
    converter, state_dict = CONVERTERS.get(entry.family), weights.state_dict
    if weights.config is not None:
        own = config_from_json(type(_build_empty(entry)), weights.config)
        config = own.changed(weights.options).changed(options)
        # The number of heads has no part in the shapes of weights, so it may be changed.
        heads = {name: x for name, x in config.options().items() if name.endswith("num_heads")}
        trained_with = own.changed(weights.options).options()
        _check_sizes(entry, {**own.options(), **heads}, options, weights.source)
    else:
        config = entry.config.changed(weights.options).changed(options)
        trained_with = {
            name: value
            for name, value in entry.config.changed(weights.options).options().items()
            if name.split(".")[0] in weights.options
        }
        if converter is not None:
            trained = options_of_names(
                converter,
                state_dict,
                config,
                given={**weights.options, **options},
                source=weights.source,
            )
            config = config.changed(trained)
    if converter is not None and converter.is_published(state_dict):
        state_dict = converter.from_published(state_dict, config)
    model = entry.build(config)
    load_state_dict(model, state_dict, source=weights.source)
    warn_of_other_rules(trained_with, config, source=weights.source)
    return model


def _check_sizes(
    entry: ModelEntry, found: Mapping[str, Any], options: Mapping[str, Any], source: str
) -> None:
    """Refuses a folder with the sizes of another model than the one asked for."""
    sizes = entry.config.changed(options).options()
    differing = [
        name
        for name, size in sizes.items()
        if name.split(".")[-1] in _SIZES and found.get(name) != size
    ]
    if differing:
        wanted, got = ({name: x.get(name) for name in differing} for x in (sizes, found))
        raise ValueError(
            f"weights for {entry.name!r} must have {as_arguments(wanted)}, {source} has "
            f"{as_arguments(got)}. Pass these as options, or call "
            f"{type(_build_empty(entry)).__name__}.from_pretrained on a folder; without weights, "
            "options are free."
        )


def _published_options(entry: ModelEntry) -> dict[str, Any]:
    return dict(CONVERTERS[entry.family].options) if entry.family in CONVERTERS else {}


def _build_empty(entry: ModelEntry) -> Any:
    """Makes a model without memory for its weights."""
    with torch.device("meta"):
        return entry.build(entry.config)
