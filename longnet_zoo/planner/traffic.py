"""Bytes that ranks send each other to attend in one layer, and what they hold meanwhile.

Bytes are those that leave a rank for another one. Lengths and masks, a few bytes a row, are left
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal, get_args

import numpy as np

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.parallel.band import Sight, last_hops
from longnet_zoo.parallel.exchange import exchanged_rows
from longnet_zoo.parallel.layout import Layout, part_length

__all__ = ["METHODS", "Method", "Traffic", "layer_traffic"]

Method = Literal["dilated", "ring", "all_to_all"]
METHODS: tuple[Method, ...] = get_args(Method)

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of attention in one layer, by rank: int64 (ranks,) each.

    Attributes:
        forward_sent: Sent in a forward pass.
        forward_received: Received in it.
        backward_sent: Sent in a backward pass.
        backward_received: Received in it.
        kept: Held from the forward to the backward pass, beside what one rank alone would keep.
        meanwhile: Held while the layer is differentiated, beside `kept`.
    """

    forward_sent: np.ndarray
    forward_received: np.ndarray
    backward_sent: np.ndarray
    backward_received: np.ndarray
    kept: np.ndarray
    meanwhile: np.ndarray


def layer_traffic(
    method: Method,
    *,
    pattern: DilatedPattern,
    seq_len: int,
    num_ranks: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    is_causal: bool,
    item_size: int,
    layout: Layout,
) -> Traffic:
    """Counts the bytes of one sequence of which each rank has a part.

    Args:
        method: How ranks share the sequence.
        pattern: The pattern, for "dilated".
        seq_len: Tokens of the whole sequence.
        num_ranks: Ranks that share it.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        head_dim: Channels of a head.
        is_causal: Whether a query sees no later key.
        item_size: Bytes of an activation.
        layout: Which rank holds which tokens, for "ring".
    """
    grad_size = max(item_size, _FLOAT32)
    if method == "dilated":
        counts = exchanged_rows(
            pattern,
            seq_len=seq_len,
            num_parts=num_ranks,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            is_causal=is_causal,
        )
        return _dilated(counts.sum(1), counts.sum(0), 2 * head_dim, item_size, grad_size)
    length = part_length(seq_len, num_ranks, layout if method == "ring" else "contiguous")
    if method == "ring":
        sight = Sight(is_causal=is_causal)
        hops = last_hops(num_ranks, length, layout, sight, ((0, seq_len),))
        keys = 2 * length * num_kv_heads * head_dim
        return _ring(hops, keys * item_size, keys * grad_size)
    # Key heads are repeated until each rank has those of its query heads.
    sent_heads = 2 * num_heads + 2 * _sent_kv_heads(num_heads, num_kv_heads, num_ranks)
    sent_heads = sent_heads // num_ranks * (num_ranks - 1)
    everywhere = np.full(num_ranks, length * sent_heads * head_dim * item_size)
    # The results as attention made them, beside those that came back.
    kept = np.full(num_ranks, length * num_heads * head_dim * item_size if num_ranks > 1 else 0)
    return Traffic(
        forward_sent=everywhere,
        forward_received=everywhere,
        backward_sent=everywhere,
        backward_received=everywhere,
        kept=kept,
        meanwhile=kept,
    )


def _sent_kv_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> int:
    heads = lcm(num_kv_heads, num_ranks)
    return heads if num_heads % heads == 0 else num_heads


def _dilated(
    sent: np.ndarray, received: np.ndarray, channels: int, item_size: int, grad_size: int
) -> Traffic:
    """Rows of keys and values travel, and their gradients back."""
    there, back = channels * item_size, channels * grad_size
    return Traffic(
        forward_sent=there * sent,
        forward_received=there * received,
        backward_sent=back * received,
        backward_received=back * sent,
        kept=there * received,
        # Sums of the gradients, these in the order of the ranks, and what comes back.
        meanwhile=back * (2 * received + sent),
    )


def _ring(hops: tuple[int, ...], key_bytes: int, grad_bytes: int) -> Traffic:
    """Keys of each rank pass on as far as they are seen; their gradients follow, and come home."""
    size, last = len(hops), np.array(hops)
    # Keys of rank s leave the ranks s, ..., s + last - 1, around the ring.
    changes = np.zeros(2 * size + 1, np.int64)
    np.add.at(changes, np.arange(size), 1)
    np.add.at(changes, np.arange(size) + last, -1)
    keys_out = changes.cumsum()[:-1].reshape(2, size).sum(0)
    # What a rank passes on has come to it, but for its own keys, and so have gradients, which it
    # passes on itself; these come home once.
    keys_in = grads_out = np.roll(keys_out, 1)
    own = (last > 0).astype(np.int64)
    grads_in = grads_out - np.roll(own, 1) + own
    held = (1 + min(2, max(hops))) * (key_bytes + grad_bytes) if size > 1 else 0
    return Traffic(
        forward_sent=key_bytes * keys_out,
        forward_received=key_bytes * keys_in,
        backward_sent=key_bytes * keys_out + grad_bytes * grads_out,
        backward_received=key_bytes * keys_in + grad_bytes * grads_in,
        kept=np.zeros(size, np.int64),
        # Own keys, those at hand, those that arrive; gradients passed on, at hand and arriving.
        meanwhile=np.full(size, held),
    )
