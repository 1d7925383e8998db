"""Parts of the multimodal model: its blocks, a pooling query, and modalities dropped at random.

Shape legend: b batch, n tokens of all modalities, n_m those of modality m, e embed_dim, h heads,
d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.layers import initialize_weights
from longnet_zoo.layers.multimodal import MultimodalBlock, MultimodalDilatedAttention
from longnet_zoo.layers.presence import Samples

from .multimodal_config import LongNetMultimodalConfig

__all__ = ["QueryPool", "drop_modalities", "flops_of", "make_block"]


class QueryPool(nn.Module):
    """Pools tokens by the attention of one learned query.

    Args:
        embed_dim: Channels, a multiple of `num_heads`.
        num_heads: Number of heads.
    """

    def __init__(self, *, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        initialize_weights(self, gain=1.0)
        self.query = nn.Parameter(torch.randn(embed_dim))

    def forward(self, features: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        """Pools the tokens of all modalities, (b, n_m, e) each, to (b, e).

        Args:
            features: Tokens by modality.
            masks: Bool (b, n_m) of those with padding, True = padding.
        """
        x = torch.cat([*features.values()], dim=1)
        split = "b n (h d) -> b h n d"
        k, v = (rearrange(f(x), split, h=self.num_heads) for f in (self.k_proj, self.v_proj))
        q = rearrange(self.query, "(h d) -> h 1 d", h=self.num_heads).to(k.dtype)
        is_seen = None
        if masks:
            rows = [
                masks.get(name, tokens.new_zeros(tokens.shape[:2], dtype=torch.bool))
                for name, tokens in features.items()
            ]
            is_seen = ~torch.cat(rows, dim=1)[:, None, None]
        out = functional.scaled_dot_product_attention(
            q.expand(len(x), -1, -1, -1), k, v, attn_mask=is_seen
        )
        return self.out_proj(rearrange(out, "b h 1 d -> b (h d)"))


def make_block(config: LongNetMultimodalConfig, *, drop_path: float) -> MultimodalBlock:
    """Makes a block in which modalities meet."""
    attention = MultimodalDilatedAttention(
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        patterns={modality.name: config.pattern_of(modality) for modality in config.parts},
        pattern=config.pattern,
        time_rate=config.time_rate,
        rotary_base=config.rotary_base,
        num_kv_heads=config.num_kv_heads,
        qk_norm=config.qk_norm,
        sub_ln=config.norm == "sub_ln",
        bias=config.bias,
        attention_dropout=config.attention_dropout,
        dropout=config.dropout,
        drop_path=drop_path,
        eps=config.eps,
        backend=config.backend,
    )
    return MultimodalBlock(
        attention=attention,
        embed_dim=config.embed_dim,
        ffn_dim=config.ffn_dim or 4 * config.embed_dim,
        activation=config.activation,
        sub_ln=config.norm == "sub_ln",
        bias=config.bias,
        activation_dropout=config.activation_dropout,
        dropout=config.dropout,
        drop_path=drop_path,
        eps=config.eps,
    )


def drop_modalities(
    samples: Samples, present: Mapping[str, Sequence[bool]] | None, *, probability: float
) -> dict[str, list[bool]]:
    """Drops modalities of samples at random, by torch's generator of the CPU.

    Each one that a sample has goes with this probability; where all would, one of them stays, each
    as likely.

    Args:
        samples: The samples.
        present: Whether each sample has a modality; None: all have all.
        probability: Probability in [0, 1).

    Returns:
        Whether each sample has a modality afterwards.
    """
    names = list(samples.inputs)
    rows = [[True] * samples.batch if present is None else list(present[n]) for n in names]
    has = torch.tensor(rows, device="cpu")
    kept = has & (torch.rand(has.shape, device="cpu") >= probability)
    # The last one: the largest of random numbers, which are above 0 only for what there is.
    last = (torch.rand(has.shape, device="cpu") + 1.0).masked_fill(~has, 0.0).argmax(dim=0)
    is_last = torch.arange(len(names), device="cpu")[:, None] == last
    kept |= is_last & ~kept.any(dim=0)
    return dict(zip(names, kept.tolist(), strict=True))


def flops_of(
    config: LongNetMultimodalConfig,
    lengths: Mapping[str, int],
    *,
    encoders: nn.ModuleDict,
    blocks: Sequence[MultimodalBlock],
) -> int:
    """Counts the FLOPs for one sample with so many tokens of each modality; see `ZooModel.flops`.

    Args:
        config: The options of the model.
        lengths: Tokens of each modality.
        encoders: The encoder of each modality.
        blocks: The blocks in which they meet.
    """
    parts = {part.name: part for part in config.parts}
    heads = (config.num_heads, config.head_dim)
    total = 2 * config.embed_dim * config.num_classes
    if any(lengths.values()):
        total += config.num_layers * config.pattern.flops(sum(lengths.values()), *heads)[0]
    for name, length in lengths.items():
        if length == 0:
            continue
        encoder: Any = encoders[name]
        part = parts[name]
        stack = [] if encoder.stack is None else list(encoder.stack.parameters())
        own = [p for block in blocks for p in block.parameters_of(name)]
        weights = sum(p.numel() for p in [*stack, *own] if p.ndim == 2)
        within, _ = config.pattern_of(part).flops(length, *heads)
        total += encoder.flops(length) + 2 * weights * length
        total += (part.num_layers + config.num_layers) * within
    return total
