"""Dilated attention whose first tokens see each other: an image before its caption.

The first `prefix_len` tokens see all of the prefix and nothing behind it; every later token sees
the prefix and what comes before it, itself included. Segments and offsets are those of the whole
sequence, so

- rows of the prefix are those of non-causal attention over the prefix alone: a segment that reaches
  beyond it holds the same rows of it as the last, shorter segment of the prefix does;
- all other rows are those of causal attention over the whole.

Shape legend: b batch, n seq_len (m of them rows), h heads = g key heads * r, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dilated_attention import DistanceBias, dilated_attention
from .pattern import DilatedPattern

__all__ = ["attend_last_rows", "prefix_attention"]


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    prefix_len: int,
    is_causal: bool = False,
    scale: float | None = None,
    bias: DistanceBias | None = None,
    xpos_scale_base: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attends by a dilated pattern, in both directions within a prefix and causally behind it.

    Causal rows of the prefix are computed and left out, but only from the last border on that all
    segments share, if they nest.

    Args:
        q: Queries, (batch, seq_len, num_heads, head_dim).
        k: Keys, (batch, seq_len, num_kv_heads, head_dim).
        v: Values, like k.
        pattern: Which keys a query sees, with `padded_keys="ignore"`.
        prefix_len: Tokens of the prefix, from 1 to seq_len - 1.
        is_causal: What a layer says of itself: it must not be causal.
        scale: As for `dilated_attention`.
        bias: As for `dilated_attention`, as a function of distances.
        xpos_scale_base: As for `dilated_attention`.
        key_padding_mask: As for `dilated_attention`.
        cu_seqlens: Refused: packed sequences have no common prefix.
        dropout_p: As for `dilated_attention`.
        backend: As for `dilated_attention`.

    Returns:
        The output, (batch, seq_len, num_heads, head_dim).

    Raises:
        ValueError: If the prefix leaves no token behind it, the layer is causal, keys are padded
            with zeros, or as `dilated_attention`.
        NotImplementedError: If sequences are packed, or `bias` is a tensor of pairs.

    Example:
        >>> q, k, v = torch.randn(3, 1, 300, 8, 64).unbind(0)
        >>> pattern = DilatedPattern.geometric(64, 256)
        >>> out = prefix_attention(q, k, v, pattern, prefix_len=257)
    """
    if not 1 <= prefix_len < q.shape[1]:
        raise ValueError(
            f"prefix_len must be from 1 to seq_len - 1, got prefix_len={prefix_len} and "
            f"seq_len={q.shape[1]}."
        )
    if is_causal:
        raise ValueError(
            "a prefix is seen in both directions, got is_causal=True. Use a layer with "
            "is_causal=False."
        )
    if pattern.padded_keys == "zero":
        raise ValueError(
            "with padded_keys='zero' a prefix would not be independent of what follows it; use "
            "padded_keys='ignore'."
        )
    if cu_seqlens is not None or isinstance(bias, Tensor):
        raise NotImplementedError(
            "prefix_attention takes no packed sequences and no bias by pairs, got "
            f"{'cu_seqlens' if cu_seqlens is not None else 'a tensor as bias'}. Use a padded batch "
            "and a bias by distances."
        )

    def attend(first: int, stop: int, *, is_causal: bool) -> Any:
        mask = None if key_padding_mask is None else key_padding_mask[:, first:stop]
        return dilated_attention(
            q[:, first:stop],
            k[:, first:stop],
            v[:, first:stop],
            pattern,
            is_causal=is_causal,
            scale=scale,
            bias=bias,
            xpos_scale_base=xpos_scale_base,
            key_padding_mask=mask,
            dropout_p=dropout_p,
            backend=backend,
        )

    # From a border that all segments share, attention begins as at the start of a sequence.
    first = prefix_len - prefix_len % pattern.segment_lengths[-1] if pattern.is_nested else 0
    of_prefix = attend(0, prefix_len, is_causal=False)
    behind = attend(first, q.shape[1], is_causal=True)[:, prefix_len - first :]
    return torch.cat([of_prefix, behind], dim=1)


def attend_last_rows(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, *, scale: float | None = None
) -> Tensor:
    """Computes the last rows of causal dilated attention, for keys that are kept from before.

    One softmax over all keys, to which the number of branches that see a key is a factor; memory
    is rows times keys. For decoding, without gradients in mind.

    Args:
        q: Queries of the last positions, (batch, num_rows, num_heads, head_dim).
        k: Keys of all positions, (batch, seq_len, num_kv_heads, head_dim).
        v: Values, like k.
        pattern: Which keys a query sees.
        scale: Factor on the dot products; 1 / sqrt(head_dim) if None.

    Returns:
        The output, (batch, num_rows, num_heads, head_dim).
    """
    num_rows, num_heads, head_dim = q.shape[1:]
    counts = _last_counts(pattern, k.shape[1], num_rows, num_heads, q.device)
    counts = counts.unflatten(0, (k.shape[2], -1))
    logits = torch.einsum("bmgrd,bngd->bgrmn", q.unflatten(2, (k.shape[2], -1)), k)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = logits.to(dtype) + counts.to(dtype).log()
    is_empty = counts.sum(-1, keepdim=True) == 0
    weights = logits.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)
    return torch.einsum("bgrmn,bngd->bmgrd", weights.to(v.dtype), v).flatten(2, 3)


def _last_counts(
    pattern: DilatedPattern, seq_len: int, num_rows: int, num_heads: int, device: torch.device
) -> Tensor:
    """How many branches let each of the last rows see each key: (h, m, n)."""
    keys = torch.arange(seq_len, device=device)
    rows = keys[seq_len - num_rows :]
    counts = torch.zeros(num_heads, num_rows, seq_len, dtype=torch.int64, device=device)
    for branch, (segment_length, rate) in enumerate(pattern.branches):
        offsets = torch.tensor(pattern.offsets(branch, num_heads), device=device)
        is_used = keys % segment_length % rate == offsets[:, None]
        segments = keys // segment_length
        is_same = segments[seq_len - num_rows :, None] == segments
        counts += is_used[:, seq_len - num_rows :, None] & is_used[:, None] & is_same
    return counts * (keys <= rows[:, None])
