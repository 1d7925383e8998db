"""Whole networks. Importing this package registers all of them."""

from .base import ZooModel, config_from_json
from .config import DENSE_SEGMENT, ModelConfig
from .text import TextModel
from .text_config import TextConfig
from .text_decoder import LongNetLM, LongNetLMConfig
from .text_encoder import LongNetMLM, LongNetMLMConfig

__all__ = [
    "DENSE_SEGMENT",
    "LongNetLM",
    "LongNetLMConfig",
    "LongNetMLM",
    "LongNetMLMConfig",
    "ModelConfig",
    "TextConfig",
    "TextModel",
    "ZooModel",
    "config_from_json",
]
