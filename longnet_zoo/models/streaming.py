"""A stack of layers that reads sequences piece by piece.

Shape legend: b batch, n new tokens, e embed_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longnet_zoo.layers import TransformerStack
from longnet_zoo.layers.attention import AttentionOp
from longnet_zoo.ops.streamed_attention import Stretch
from longnet_zoo.ops.streaming import StreamingCache

from .checks import right_padded_lengths

if TYPE_CHECKING:
    from .text import TextModel

__all__ = ["check_cache", "run_stream"]


def run_stream(
    stack: TransformerStack, x: Tensor, cache: StreamingCache, key_padding_mask: Tensor | None
) -> Tensor:
    """Runs a causal stack on embeddings that follow what the cache has read.

    Args:
        stack: The layers.
        x: Embeddings, (batch, seq_len, embed_dim).
        cache: What they have read; then also these.
        key_padding_mask: Bool (batch, seq_len), True = padding, on the right.

    Returns:
        Output, (batch, seq_len, embed_dim), zero at padding.

    Raises:
        ValueError: If padding is not on the right.
        TypeError: If the mask is not bool.
        RuntimeError: If an earlier call with the cache was interrupted.
    """
    num_tokens = [x.shape[1]] * len(x)
    if key_padding_mask is not None:
        shape = tuple(x.shape[:2])
        num_tokens = right_padded_lengths("key_padding_mask", key_padding_mask, shape).tolist()
    with cache.reading(num_tokens) as stretches:
        if len(stretches) == 1 and min(num_tokens) == x.shape[1]:
            return _run(stack, x, cache, stretches[0])
        out = torch.zeros_like(x)
        for stretch in stretches:
            own = x[stretch.rows, : stretch.length]
            out[stretch.rows, : stretch.length] = _run(stack, own, cache, stretch)
    return out


def check_cache(
    model: TextModel, cache: StreamingCache, x: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Checks that a model can read embeddings with a cache.

    Raises:
        ValueError: If the cache is for another batch or model, sequences are packed, the model is
            in training mode, or gradients are asked for.
        TypeError: If it is no cache.
    """
    if not isinstance(cache, StreamingCache):
        raise TypeError(
            f"cache must be a StreamingCache, got {type(cache).__name__}. Use model.make_cache()."
        )
    num_layers = len(model.stack.blocks)
    if cache.num_layers != num_layers or cache.pattern != model.config.pattern:
        raise ValueError(
            f"the cache must be of this model, with {num_layers} layers and "
            f"{model.config.pattern}, got one with {cache.num_layers} layers and {cache.pattern}. "
            "Use model.make_cache()."
        )
    if len(x) != cache.batch_size:
        raise ValueError(
            f"the cache is for a batch of {cache.batch_size}, got {len(x)} sequences. Use "
            f"model.make_cache(batch_size={len(x)})."
        )
    if cu_seqlens is not None:
        raise ValueError(
            f"packed sequences cannot be read with a cache, got cu_seqlens={cu_seqlens.tolist()}. "
            "Use a batch with key_padding_mask."
        )
    if model.training:
        raise ValueError(
            "a cache needs a model in evaluation mode, got one in training mode. Call model.eval()."
        )
    needs_grad = x.requires_grad or any(weight.requires_grad for weight in model.parameters())
    if torch.is_grad_enabled() and needs_grad:
        raise ValueError(
            "no gradient flows through a cache, got embeddings or weights that require one. Use "
            "torch.no_grad() or torch.inference_mode()."
        )


def _run(stack: TransformerStack, x: Tensor, cache: StreamingCache, stretch: Stretch) -> Tensor:
    ops = cache.attention_ops(stretch)
    if stretch.is_step:
        # Rows may stand at different positions: tokens go side by side, each with its own.
        positions = torch.tensor(stretch.starts, device=x.device)
        return _run_at(stack, x.transpose(0, 1), positions, ops).transpose(0, 1)
    start = stretch.starts[0]
    return _run_at(stack, x, torch.arange(start, start + x.shape[1], device=x.device), ops)


def _run_at(
    stack: TransformerStack, x: Tensor, positions: Tensor, ops: list[AttentionOp]
) -> Tensor:
    return stack(x, positions=None if stack.rotary is None else positions, attention_ops=ops)
