"""Whole networks. Importing this package registers all of them."""

from .base import ZooModel, config_from_json
from .beit3 import BEiT3, BEiT3Config
from .config import ModelConfig, ZooConfig
from .longvit import LongViT, LongViTConfig
from .pixels import SlidePixels
from .slide_config import GigaPathSlideConfig, slide_segment_lengths
from .slide_encoder import GigaPathSlideEncoder
from .text import TextModel
from .text_config import TextConfig
from .text_decoder import LongNetLM, LongNetLMConfig
from .text_encoder import LongNetMLM, LongNetMLMConfig

__all__ = [
    "BEiT3",
    "BEiT3Config",
    "GigaPathSlideConfig",
    "GigaPathSlideEncoder",
    "LongNetLM",
    "LongNetLMConfig",
    "LongNetMLM",
    "LongNetMLMConfig",
    "LongViT",
    "LongViTConfig",
    "ModelConfig",
    "SlidePixels",
    "TextConfig",
    "TextModel",
    "ZooConfig",
    "ZooModel",
    "config_from_json",
    "slide_segment_lengths",
]
