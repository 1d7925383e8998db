"""Whole networks. Importing this package registers all of them."""

from .text import TextModel
from .text_config import TextConfig
from .text_decoder import LongNetLM, LongNetLMConfig
from .text_encoder import LongNetMLM, LongNetMLMConfig

__all__ = [
    "LongNetLM",
    "LongNetLMConfig",
    "LongNetMLM",
    "LongNetMLMConfig",
    "TextConfig",
    "TextModel",
]
