"""Which converter the weights of a family need."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from longnet_zoo.models import ModelConfig, ZooModel
from longnet_zoo.registry import registered_models

from . import beit3, gigapath, longvit, torchscale
from .keys import Converter, as_arguments

__all__ = ["CONVERTERS", "options_of_names", "to_published_state_dict"]

_LOGGER = logging.getLogger(__name__)

CONVERTERS: Mapping[str, Converter] = {
    "gigapath_slide": gigapath.CONVERTER,
    "longnet_beit3": beit3.CONVERTER,
    "longnet_lm": torchscale.CONVERTER,
    "longnet_mlm": torchscale.CONVERTER,
    "longvit": longvit.CONVERTER,
}


def options_of_names(
    converter: Converter,
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    given: Collection[str],
    source: str,
) -> dict[str, Any]:
    """Tells the options that weights bring by the names they are saved under.

    Published names bring those of the converter. Ours bring none, and where nothing else says with
    which ones the weights were trained, a warning is logged: no key would be missed.

    Args:
        converter: That of the family.
        state_dict: The weights.
        config: The config that they would be loaded with.
        given: Names of the options that are known.
        source: What to call the weights in the warning.

    Returns:
        Options that are not given.
    """
    unknown = {name: value for name, value in converter.options.items() if name not in given}
    if converter.is_published(state_dict):
        return unknown
    if unknown and len(unknown) == len(converter.options):
        _LOGGER.warning(
            "%s does not say by which rules it was trained; the model has %s. Pass the right ones "
            "(weights that began as published ones: %s). Folders of save_pretrained keep them.",
            source,
            as_arguments({name: getattr(config, name) for name in unknown}),
            as_arguments(unknown),
        )
    return {}


def to_published_state_dict(model: ZooModel) -> dict[str, Tensor]:
    """Renames the weights of a model to the names that weights of its family are published under.

    Args:
        model: A model of this package.

    Returns:
        Weights under the published names, sharing memory with the model.

    Raises:
        TypeError: If it is no model of this package.
        NotImplementedError: If nothing is published for its family, or the published code would
            compute something else with these weights.

    Example:
        >>> torch.save({"model": to_published_state_dict(model)}, "slide_encoder.pth")
    """
    if not isinstance(model, ZooModel):
        raise TypeError(f"model must be one of this package, got {type(model).__name__}.")
    families = {
        entry.family for entry in registered_models() if type(entry.config) is type(model.config)
    }
    converters = [CONVERTERS[family] for family in families & CONVERTERS.keys()]
    if not converters:
        raise NotImplementedError(
            f"no weights like those of {type(model).__name__} are published, so they have no other "
            f"names. There are names for the families {', '.join(sorted(CONVERTERS))}."
        )
    return converters[0].to_published(model)
