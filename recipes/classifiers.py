"""Models of the registry as classifiers: which ones a recipe takes, their head, their options."""

import dataclasses
from typing import Any

from torch import nn

import longnet_zoo as lz
from longnet_zoo.models import ZooConfig
from longnet_zoo.registry import find_model, registered_models

__all__ = ["changed_options", "check_modality", "create_classifier"]


def check_modality(name: str, *modalities: str, kind: str) -> None:
    """Refuses a model that does not read what a recipe feeds it.

    Args:
        name: Name in the registry.
        *modalities: What the model may read, as in the registry.
        kind: What to call such a model.

    Raises:
        ValueError: The model reads something else; the message names those that work.
    """
    entry = find_model(name)
    if entry.modality not in modalities:
        known = [other.name for other in registered_models() if other.modality in modalities]
        raise ValueError(
            f"model_name must be {kind}, got {name!r}, which is none (family {entry.family!r}, "
            f"for {entry.modality}). Use one of {', '.join(known)}, or the recipe for that model."
        )


def create_classifier(
    name: str, *, num_classes: int, pretrained: Any = False, options: dict[str, Any] | None = None
) -> nn.Module:
    """Makes a model of the registry with a head for these classes.

    Args:
        name: Name in the registry.
        num_classes: Number of classes.
        pretrained: As in `longnet_zoo.create_model`. The weights are expected without a head;
            where they have one, `options["num_classes"]` says of how many classes. A head of
            another size is replaced by a new one.
        options: Options of `longnet_zoo.create_model`.

    Returns:
        The model.
    """
    head = num_classes if pretrained is False else 0
    model = lz.create_model(name, pretrained=pretrained, **{"num_classes": head, **(options or {})})
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def changed_options(model: nn.Module, name: str) -> dict[str, Any]:
    """Returns the options that make a model again, without its pretrained weights.

    Those may have brought options of their own, so what the user gave is not enough.

    Args:
        model: The model.
        name: Its name in the registry.

    Returns:
        The fields of its config that differ from the registered one; the number of classes, which
        recipes keep by themselves, is left out. Lists stand for tuples, as in a YAML file.
    """
    changed = _changed(model.config, find_model(name).config)
    changed.pop("num_classes", None)
    return _plain(changed)


def _changed(config: ZooConfig, default: ZooConfig) -> dict[str, Any]:
    """Returns the fields that differ; those of a part of the model as a dict of their own."""
    changed = {}
    plain = dataclasses.asdict(config)
    for name, value in plain.items():
        mine, usual = getattr(config, name), getattr(default, name)
        if mine != usual:
            is_part = isinstance(mine, ZooConfig) and type(mine) is type(usual)
            changed[name] = _changed(mine, usual) if is_part else value
    return changed


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, (list, tuple)) else value
