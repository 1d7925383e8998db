"""Modules with parameters: attention, positions, feed-forward, block, stack, initialization."""

from .attention import DilatedAttention, Position
from .block import Norm, TransformerBlock
from .feed_forward import Activation, FeedForward
from .initialization import initialize_weights, residual_gain, residual_scale
from .memory import MemorySaving
from .multihead import MultiheadDilatedAttention
from .multimodal import MultimodalBlock, MultimodalDilatedAttention
from .multiway import Multiway, Route, make_multiway, run_routed
from .positions import AlibiBias, RelativeBias, RotaryEmbedding
from .stack import TransformerStack

__all__ = [
    "Activation",
    "AlibiBias",
    "DilatedAttention",
    "FeedForward",
    "MemorySaving",
    "MultiheadDilatedAttention",
    "MultimodalBlock",
    "MultimodalDilatedAttention",
    "Multiway",
    "Norm",
    "Position",
    "RelativeBias",
    "RotaryEmbedding",
    "Route",
    "TransformerBlock",
    "TransformerStack",
    "initialize_weights",
    "make_multiway",
    "residual_gain",
    "residual_scale",
    "run_routed",
]
