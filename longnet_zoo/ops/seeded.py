"""What branches draw by a seed: matrices of hashes, and random blocks.

Hashing is an operator, since a compiler does not follow a generator of random numbers; blocks are
drawn inside of the operator that attends.

Shape legend: b batch, n seq_len, h num_heads, d head_dim, r rounds, m half of the buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_blocks", "hash_labels"]

_MAX_PRODUCTS = 2**22


def hash_labels(
    x: Tensor, *, num_kv_heads: int, num_buckets: int, num_rounds: int, seed: int
) -> Tensor:
    """Hashes every vector of every head; see `HashBuckets`.

    Args:
        x: Queries or keys, (batch, seq_len, num_heads, head_dim).
        num_kv_heads: Heads with a matrix of their own; query heads that share a key head share it.
        num_buckets: Number of hashes.
        num_rounds: Hashes of each vector.
        seed: Seed of the matrices.

    Returns:
        Buckets, int32, (num_rounds, batch, seq_len, num_heads).
    """
    labels: Tensor = torch.ops.longnet_zoo.hash_labels(
        x.detach(), num_kv_heads, num_buckets, num_rounds, seed
    )
    return labels


def draw_blocks(num_blocks: int, num_draws: int, seed: int) -> Tensor:
    """Draws numbers of earlier blocks for every block, int64 (num_blocks, num_draws), on the CPU.

    Block 0 draws itself. The draws of a block do not depend on how many follow.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(
        num_blocks, num_draws, generator=generator, dtype=torch.float64, device="cpu"
    )
    return (shares * torch.arange(num_blocks, device="cpu")[:, None]).long()


def _hash_labels(
    x: Tensor, num_kv_heads: int, num_buckets: int, num_rounds: int, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_kv_heads, num_rounds, x.shape[3], num_buckets // 2)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    # A long column would win more often than its share.
    matrices = torch.nn.functional.normalize(matrices, dim=2).to(x.device)
    labels = _like_labels(x, num_kv_heads, num_buckets, num_rounds, seed)
    group_size = x.shape[2] // num_kv_heads
    rows = max(1, _MAX_PRODUCTS // (x.shape[0] * group_size * num_rounds * num_buckets))
    with torch.autocast(x.device.type, enabled=False):
        for head, matrix in enumerate(matrices):
            heads = slice(head * group_size, (head + 1) * group_size)
            for start in range(0, x.shape[1], rows):
                part = x[:, start : start + rows, heads].float()
                products = torch.einsum("bnhd,rdm->rbnhm", part, matrix)
                place = products.abs().argmax(-1, keepdim=True)
                is_negative = products.gather(-1, place) < 0
                found = torch.where(is_negative, place + num_buckets // 2, place)
                labels[:, :, start : start + rows, heads] = found.squeeze(-1).int()
    return labels


def _like_labels(
    x: Tensor, num_kv_heads: int, num_buckets: int, num_rounds: int, seed: int
) -> Tensor:
    return x.new_empty((num_rounds, *x.shape[:3]), dtype=torch.int32)


_hash_op = torch.library.custom_op(
    "longnet_zoo::hash_labels",
    _hash_labels,
    mutates_args=(),
    schema="(Tensor x, int num_kv_heads, int num_buckets, int num_rounds, SymInt seed) -> Tensor",
)
_hash_op.register_fake(_like_labels)
