"""Making, listing and describing models by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

import longnet_zoo.models  # noqa: F401 - registers every model
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.registry import (
    ModelEntry,
    PublishedWeights,
    find_model,
    nearest_names,
    registered_models,
)
from longnet_zoo.weights import load_state_dict, read_state_dict

__all__ = ["ModelInfo", "create_model", "list_models", "model_info"]

Pretrained = bool | str | os.PathLike[str] | Mapping[str, Tensor]


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


def create_model(name: str, *, pretrained: Pretrained = False, **options: Any) -> nn.Module:
    """Makes a registered model.

    Args:
        name: A name of `list_models()`.
        pretrained: Where its weights come from. False: initial values. A path of a `.safetensors`,
            `.pth`, `.pt`, `.bin` or `.ckpt` file, or a state dict: loaded strictly. True: the
            published weights.
        **options: Fields of the model's config that differ from its defaults.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If the name is unknown, an option has a bad value, weights do not fit, or
            there are no published weights.
        TypeError: If an option is unknown or of the wrong type.
        FileNotFoundError: If `pretrained` is a path without a file.

    Example:
        >>> model = create_model("longnet_lm_tiny", vocab_size=1000, num_layers=2)
        >>> logits = model(torch.randint(1000, (1, 4096)))
    """
    entry = find_model(name)
    config = _configure(entry, options)
    source, state_dict = _find_weights(entry, pretrained)
    model = entry.build(config)
    if state_dict is not None:
        load_state_dict(model, state_dict, source=source)
    return model


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
    with torch.device("meta"):
        model: Any = entry.build(entry.config)
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
    )


def _configure(entry: ModelEntry, options: dict[str, Any]) -> Any:
    valid = [field.name for field in fields(entry.config)]
    for option in options:
        if option not in valid:
            near = nearest_names(option, valid)
            cure = f"Did you mean {near}? " if near else ""
            raise TypeError(
                f"{entry.name} has no option {option!r}. {cure}Options: {', '.join(valid)}."
            )
    return replace(entry.config, **options)


def _find_weights(
    entry: ModelEntry, pretrained: Pretrained
) -> tuple[str, Mapping[str, Tensor] | None]:
    if pretrained is False:
        return "", None
    if pretrained is True:
        if not entry.weights:
            raise ValueError(
                f"no weights are published for {entry.name!r}. Pass pretrained=False, or your own: "
                "the path of a .safetensors, .pth, .pt, .bin or .ckpt file, or a state dict."
            )
        pretrained = entry.weights[0].location
    if isinstance(pretrained, Mapping):
        return "the state dict", pretrained
    if isinstance(pretrained, (str, os.PathLike)):
        return repr(os.fspath(pretrained)), read_state_dict(pretrained)
    raise TypeError(
        "pretrained must be a bool, the path of a file or a state dict, got "
        f"{type(pretrained).__name__}."
    )
