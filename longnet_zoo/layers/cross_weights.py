"""Who attends to whom across modalities: the weights of the softmax, for pictures.

Dense and in float64, so for short sequences and on request only; the normal pass never makes them.

Shape legend: b batch, h heads, n tokens of all modalities, n_m those of modality m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference

from .multimodal import MultimodalDilatedAttention, RotaryTables
from .timeline import Timeline

__all__ = ["cross_weights", "modality_shares"]

# Bytes of the weights of one head and sample are 8 * n^2: 128 MiB.
_MAX_TOKENS = 4096
Weights = dict[tuple[str, str], Tensor]


def cross_weights(
    attention: MultimodalDilatedAttention,
    x: Mapping[str, Tensor],
    timeline: Timeline,
    tables: RotaryTables,
) -> Weights:
    """Computes the weights of the attention across modalities.

    Args:
        attention: The layer.
        x: Tokens of each modality, (b, n_m, embed_dim), as `attend_within` returns them.
        timeline: Where they are in the merged sequence.
        tables: What `rotary_tables` makes of it.

    Returns:
        For each pair (modality of the queries, modality of the keys) the weights, float64
        (b, h, n_query, n_key). Those of a query add up to 1 over all keys; to 0 for padding and
        for a query that no branch covers.

    Raises:
        ValueError: If there are more than 4,096 tokens.
    """
    total = sum(timeline.lengths.values())
    if total > _MAX_TOKENS:
        raise ValueError(
            f"dense weights are for at most {_MAX_TOKENS} tokens, got {total}. Pass a part."
        )
    found: list[Tensor] = []

    def record(q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, **options: Any) -> Tensor:
        kept = ("is_causal", "key_padding_mask")
        kept_options = {name: options[name] for name in kept}
        # Values that are the unit vectors make the output the weights.
        units = torch.eye(total, dtype=torch.float64, device=v.device)
        units = units[:, None].expand(len(v), -1, v.shape[2], -1)
        weights = dilated_attention_reference(q, k, units, pattern, **kept_options)
        assert isinstance(weights, Tensor)
        found.append(weights)
        return torch.zeros_like(q)

    with torch.no_grad():
        attention.attend_across(dict(x), timeline, tables, op=record)
    by_query = timeline.stored(found[0])  # (b, n, h, n)
    stored = timeline.stored(by_query.transpose(1, 3)).permute(0, 2, 3, 1)
    sizes = list(timeline.lengths.values())
    return {
        (query, key): weights
        for query, rows in zip(timeline.lengths, stored.split(sizes, dim=2), strict=True)
        for key, weights in zip(timeline.lengths, rows.split(sizes, dim=3), strict=True)
    }


def modality_shares(weights: Mapping[tuple[str, str], Tensor]) -> Tensor:
    """Computes which share of its attention each modality gives to each other one.

    Args:
        weights: What `cross_weights` returns.

    Returns:
        Shares, float64 (b, modalities, modalities), mean over heads and over the queries that see
        anything; rows are the modalities of the queries in their order, and add up to 1.
    """
    names = list(dict.fromkeys(query for query, _ in weights))
    rows = []
    for query in names:
        mass = torch.stack([weights[query, key].sum(-1) for key in names], dim=-1)
        sees = mass.sum(-1, keepdim=True) > 0
        count = sees.sum(dim=(1, 2)).clamp(min=1)
        rows.append(mass.sum(dim=(1, 2)) / count)
    return torch.stack(rows, dim=1)
