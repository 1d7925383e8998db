"""Exact dilated attention (LongNet) and its model zoo on plain PyTorch."""

from . import timm_registry  # noqa: F401 - timm then knows the vision models
from .batch_tokenizer import get_tokenizer
from .factory import ModelInfo, create_model, list_models, model_info
from .image_text import create_model_and_transforms, zero_shot_classifier, zero_shot_logits
from .interop.torchscale import from_torchscale, to_torchscale_state_dict
from .layers import DilatedAttention, MultiheadDilatedAttention, MultimodalDilatedAttention
from .ops import (
    BigBirdBlocks,
    BlockSparse,
    DilatedPattern,
    HashBuckets,
    TokenSubset,
    dilated_attention,
    explain_backend,
)
from .ops.streaming import StreamingCache
from .parallel import RingAttention, parallelize
from .text import generate_text, score_file

__version__ = "0.1.0"

__all__ = [
    "BigBirdBlocks",
    "BlockSparse",
    "DilatedAttention",
    "DilatedPattern",
    "HashBuckets",
    "ModelInfo",
    "MultiheadDilatedAttention",
    "MultimodalDilatedAttention",
    "RingAttention",
    "StreamingCache",
    "TokenSubset",
    "create_model",
    "create_model_and_transforms",
    "dilated_attention",
    "explain_backend",
    "from_torchscale",
    "generate_text",
    "get_tokenizer",
    "list_models",
    "model_info",
    "parallelize",
    "score_file",
    "to_torchscale_state_dict",
    "zero_shot_classifier",
    "zero_shot_logits",
]
