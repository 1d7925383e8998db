"""Other packages with dilated attention, as far as they are installed, without their projections.

They do not compute the same: each cell says by how much a package differs from the paper's formula.
Constructors are called as in microsoft/torchscale 4d1e0e8, fkodom/dilated-attention-pytorch 87cda75
and alexisrozhkov/dilated-self-attention 7fcbfea.

Shape legend: b batch, n seq_len, h num_heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import Tensor, nn

from longnet_zoo.ops import DilatedPattern

__all__ = ["PEERS", "make_peer"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_peer(name: str, pattern: DilatedPattern, q: Tensor) -> Attend:
    """Causal attention (b, n, h, d) by a package, for tensors like q.

    Raises:
        ImportError: If the package, or what it needs, is not installed.
    """
    return PEERS[name](pattern, q.shape[2], q.shape[3], q.device)


def _torchscale(
    pattern: DilatedPattern, num_heads: int, head_dim: int, device: torch.device
) -> Attend:
    from torchscale.component.dilated_attention import DilatedAttention

    options = SimpleNamespace(
        flash_attention=True,
        segment_length=list(pattern.segment_lengths),
        dilated_ratio=list(pattern.dilation_rates),
        seq_parallel=False,
        multiway=False,
        xpos_rel_pos=False,
        layernorm_eps=1e-5,
    )
    module = DilatedAttention(options, num_heads * head_dim, num_heads, self_attention=True)
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(module, projection, nn.Identity())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = module(*(x.flatten(2) for x in (q, k, v)), is_causal=True)
        return out.unflatten(-1, q.shape[2:])

    return attend


def _dilated_attention_pytorch(
    pattern: DilatedPattern, num_heads: int, head_dim: int, device: torch.device
) -> Attend:
    from dilated_attention_pytorch.dilated_attention import DilatedAttention

    module = DilatedAttention(list(pattern.segment_lengths), list(pattern.dilation_rates))
    return partial(module, is_causal=True)


def _dilated_self_attention(
    pattern: DilatedPattern, num_heads: int, head_dim: int, device: torch.device
) -> Attend:
    from dilated_self_attention.dilated_self_attention import DilatedSelfAttention
    from dilated_self_attention.self_attention import SelfAttention

    lengths, rates = list(pattern.segment_lengths), list(pattern.dilation_rates)
    longest = max(length // rate for length, rate in pattern.branches)
    heads = []
    for head in range(num_heads):
        attention = SelfAttention(3 * head_dim, head_dim, longest)
        attention.qkv_proj = nn.Identity()
        heads.append(DilatedSelfAttention(lengths, rates, head, attention.to(device)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_head = rearrange([q, k, v], "c b n h d -> h b n (c d)")
        outs = [module(x) for module, x in zip(heads, by_head, strict=True)]
        return torch.stack(outs, dim=2)

    return attend


PEERS: dict[str, Callable[[DilatedPattern, int, int, torch.device], Attend]] = {
    "torchscale": _torchscale,
    "dilated-attention-pytorch": _dilated_attention_pytorch,
    "dilated-self-attention": _dilated_self_attention,
}
