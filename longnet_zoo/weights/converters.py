"""Which converter the weights of a family need."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from longnet_zoo.models import ZooModel
from longnet_zoo.registry import registered_models

from . import beit3, gigapath, longvit, torchscale
from .keys import Converter

__all__ = ["CONVERTERS", "to_published_state_dict"]

CONVERTERS: Mapping[str, Converter] = {
    "gigapath_slide": gigapath.CONVERTER,
    "longnet_beit3": beit3.CONVERTER,
    "longnet_lm": torchscale.CONVERTER,
    "longnet_mlm": torchscale.CONVERTER,
    "longvit": longvit.CONVERTER,
}


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
