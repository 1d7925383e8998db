"""Exact dilated attention (LongNet) and its model zoo on plain PyTorch."""

from . import timm_registry  # noqa: F401 - timm then knows the vision models
from .factory import ModelInfo, create_model, list_models, model_info
from .layers import DilatedAttention, MultiheadDilatedAttention
from .ops import DilatedPattern, dilated_attention, explain_backend
from .parallel import RingAttention, parallelize

__version__ = "0.1.0"

__all__ = [
    "DilatedAttention",
    "DilatedPattern",
    "ModelInfo",
    "MultiheadDilatedAttention",
    "RingAttention",
    "create_model",
    "dilated_attention",
    "explain_backend",
    "list_models",
    "model_info",
    "parallelize",
]
