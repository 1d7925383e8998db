"""Weights from files, state dicts and other code bases. Foreign names stop here."""

from .load import load_state_dict, read_state_dict
from .torchscale import (
    config_from_torchscale,
    convert_torchscale_state_dict,
    model_from_torchscale,
    to_torchscale_state_dict,
)

__all__ = [
    "config_from_torchscale",
    "convert_torchscale_state_dict",
    "load_state_dict",
    "model_from_torchscale",
    "read_state_dict",
    "to_torchscale_state_dict",
]
