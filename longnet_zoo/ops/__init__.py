"""Pure functions on tensors: dilated attention and what it is made of."""

from .cross_entropy import linear_cross_entropy
from .dilated_attention import DistanceBias, dilated_attention
from .explain import BackendReport, explain_backend
from .kernels import BACKENDS
from .pattern import DilatedPattern

__all__ = [
    "BACKENDS",
    "BackendReport",
    "DilatedPattern",
    "DistanceBias",
    "dilated_attention",
    "explain_backend",
    "linear_cross_entropy",
]
