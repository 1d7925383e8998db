"""Pure functions on tensors: dilated attention and what it is made of."""

from .branches import BigBirdBlocks, BlockSparse, HashBuckets, TokenSubset
from .cross_entropy import linear_cross_entropy
from .dilated_attention import DistanceBias, dilated_attention
from .explain import BackendReport, explain_backend
from .kernels import BACKENDS
from .pattern import DilatedPattern

__all__ = [
    "BACKENDS",
    "BackendReport",
    "BigBirdBlocks",
    "BlockSparse",
    "DilatedPattern",
    "DistanceBias",
    "HashBuckets",
    "TokenSubset",
    "dilated_attention",
    "explain_backend",
    "linear_cross_entropy",
]
