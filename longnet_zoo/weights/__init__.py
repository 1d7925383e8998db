"""Weights from files, state dicts and other code bases. Foreign names stop here."""

from .checkpoint import read_state_dict
from .converters import CONVERTERS, options_of_names, to_published_state_dict
from .download import DownloadOptions
from .load import load_state_dict
from .sources import FoundWeights, Pretrained, find_weights
from .torchscale import (
    config_from_torchscale,
    convert_torchscale_state_dict,
    model_from_torchscale,
    to_torchscale_state_dict,
)

__all__ = [
    "CONVERTERS",
    "DownloadOptions",
    "FoundWeights",
    "Pretrained",
    "config_from_torchscale",
    "convert_torchscale_state_dict",
    "find_weights",
    "load_state_dict",
    "model_from_torchscale",
    "options_of_names",
    "read_state_dict",
    "to_published_state_dict",
    "to_torchscale_state_dict",
]
