"""Whole networks. Importing this package registers all of them."""

from .audio import LongNetAudio
from .audio_config import LongNetAudioConfig
from .base import ZooModel, config_from_json
from .beit3 import BEiT3, BEiT3Config
from .clip import LongNetCLIP, LongNetCLIPConfig
from .config import ModelConfig, ZooConfig
from .longvit import LongViT, LongViTConfig
from .multimodal import LongNetMultimodal
from .multimodal_config import (
    AudioModality,
    FeaturesModality,
    FramesModality,
    ImageModality,
    LongNetMultimodalConfig,
    ModalityConfig,
    TextModality,
)
from .pixels import SlidePixels
from .slide_config import GigaPathSlideConfig, slide_segment_lengths
from .slide_encoder import GigaPathSlideEncoder
from .text import TextModel
from .text_config import TextConfig
from .text_decoder import LongNetLM, LongNetLMConfig
from .text_encoder import LongNetMLM, LongNetMLMConfig

__all__ = [
    "AudioModality",
    "BEiT3",
    "BEiT3Config",
    "FeaturesModality",
    "FramesModality",
    "GigaPathSlideConfig",
    "GigaPathSlideEncoder",
    "ImageModality",
    "LongNetAudio",
    "LongNetAudioConfig",
    "LongNetCLIP",
    "LongNetCLIPConfig",
    "LongNetLM",
    "LongNetLMConfig",
    "LongNetMLM",
    "LongNetMLMConfig",
    "LongNetMultimodal",
    "LongNetMultimodalConfig",
    "LongViT",
    "LongViTConfig",
    "ModalityConfig",
    "ModelConfig",
    "SlidePixels",
    "TextConfig",
    "TextModality",
    "TextModel",
    "ZooConfig",
    "ZooModel",
    "config_from_json",
    "slide_segment_lengths",
]
