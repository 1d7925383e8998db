"""One sequence over many processes: schedules, layouts, and what switches them on."""

from .all_to_all import all_to_all_attention
from .contrastive import ParallelContrastiveLoss
from .dilated import parallel_dilated_attention
from .layout import (
    Layout,
    gather_sequence,
    part_length,
    positions_of,
    shard_padding_mask,
    shard_sequence,
    shard_text,
)
from .parallelize import parallelize
from .ring import ring_attention
from .ring_layer import RingAttention, ring_mesh
from .styles import ParallelAttention, ParallelStack, ParallelTextLoss
from .tree import tree_attention

__all__ = [
    "Layout",
    "ParallelAttention",
    "ParallelContrastiveLoss",
    "ParallelStack",
    "ParallelTextLoss",
    "RingAttention",
    "all_to_all_attention",
    "gather_sequence",
    "parallel_dilated_attention",
    "parallelize",
    "part_length",
    "positions_of",
    "ring_attention",
    "ring_mesh",
    "shard_padding_mask",
    "shard_sequence",
    "shard_text",
    "tree_attention",
]
