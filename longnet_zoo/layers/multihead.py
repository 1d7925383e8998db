"""Dilated self-attention with the interface and parameters of `torch.nn.MultiheadAttention`.

Shape legend: b batch, n seq_len, h num_heads, d head_dim.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern

from .attention import check_attention_options

__all__ = ["MultiheadDilatedAttention"]


class MultiheadDilatedAttention(nn.Module):
    """Drop-in for `nn.MultiheadAttention(batch_first=True)` in self-attention.

    Put it into a stock layer with `layer.self_attn = MultiheadDilatedAttention(...)`. Parameters
    have the stock names, so the weights of a stock layer load. It has no positions of its own.
    What it cannot honour raises: cross-attention, and masks other than causal and padding ones.
    Attention weights are never formed, so they are returned as None even if asked for (asking is
    the default of `nn.MultiheadAttention`). Masks are read to check them, which breaks a compiled
    graph: for `torch.compile(fullgraph=True)` say `is_causal=True` and pass none.

    Args:
        embed_dim: Channels in and out, a multiple of `num_heads`.
        num_heads: Number of heads.
        pattern: Segment lengths and dilation rates.
        is_causal: Whether a query never sees a later key, whatever `forward` is told.
        bias: Whether the projections have a bias.
        dropout: Dropout of the attention weights in training, in [0, 1).
        backend: Kernel of the op; `"auto"` takes the fastest that serves.

    Raises:
        ValueError: If sizes do not divide, or an option is outside its range.
        TypeError: If `pattern` is not a `DilatedPattern`.

    Example:
        >>> layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> pattern = DilatedPattern.geometric(64, 256)
        >>> layer.self_attn = MultiheadDilatedAttention(embed_dim=64, num_heads=4, pattern=pattern)
    """

    # Read by nn.TransformerEncoderLayer and nn.TransformerEncoder. With the second one True, they
    # would in eval mode hand the weights to a fused kernel of dense attention and never call us.
    batch_first = True
    _qkv_same_embed_dim = False

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        pattern: DilatedPattern,
        is_causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_attention_options(embed_dim, num_heads, num_heads, pattern, dropout, backend)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.pattern = pattern
        self.is_causal = is_causal
        self.dropout = dropout
        self.backend = backend
        self.attention_op = dilated_attention
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attends within a batch of sequences.

        Args:
            query: Input, (batch, seq_len, embed_dim) or (seq_len, embed_dim).
            key: The same tensor.
            value: The same tensor.
            key_padding_mask: (batch, seq_len), bool with True = padding, or float with -inf =
                padding and 0 elsewhere, which nn.TransformerEncoderLayer makes of a bool mask.
            need_weights: No effect, weights are never returned.
            attn_mask: None or the causal mask, bool or float, (seq_len, seq_len), as
                `nn.Transformer.generate_square_subsequent_mask` makes it.
            average_attn_weights: No effect, weights are never returned.
            is_causal: Whether a query sees no later key; `attn_mask` need not be given.

        Returns:
            Output in the shape of `query`, and None in the place of attention weights.

        Raises:
            NotImplementedError: If `key` or `value` is not `query`, or `attn_mask` not causal.
            ValueError: If a shape does not fit, a float padding mask holds other values, or a
                nested `query` comes with a mask.
            TypeError: If a mask is neither bool nor float.
        """
        del need_weights, average_attn_weights
        if key is not query or value is not query:
            raise NotImplementedError(
                "MultiheadDilatedAttention is self-attention: key and value must be the very "
                f"tensor given as query, got query {tuple(query.shape)}, key {tuple(key.shape)} "
                f"and value {tuple(value.shape)}. Use nn.MultiheadAttention for cross-attention."
            )
        if query.is_nested:
            _refuse_masks(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
            return self._forward_nested(query, self.is_causal or is_causal), None
        if query.ndim == 2:
            mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            batched = query.unsqueeze(0)
            out, _ = self(batched, batched, batched, mask, attn_mask=attn_mask, is_causal=is_causal)
            return out.squeeze(0), None
        if query.ndim != 3 or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"query must be (batch, seq_len, embed_dim) with embed_dim={self.embed_dim}, "
                f"got {tuple(query.shape)}."
            )
        is_causal = self.is_causal or is_causal or attn_mask is not None
        _check_causal_mask(attn_mask, query.shape[1])
        mask = _bool_padding_mask(key_padding_mask, query)
        return self._attend(query, mask, is_causal), None

    def extra_repr(self) -> str:
        """Lists the options."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, pattern={self.pattern}, "
            f"is_causal={self.is_causal}, dropout={self.dropout}, backend={self.backend!r}"
        )

    def _attend(self, x: Tensor, key_padding_mask: Tensor | None, is_causal: bool) -> Tensor:
        qkv = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.num_heads)
        out = self.attention_op(
            q,
            k,
            v,
            self.pattern,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(rearrange(out, "b n h d -> b n (h d)"))

    def _forward_nested(self, x: Tensor, is_causal: bool) -> Tensor:
        # nn.TransformerEncoder makes a nested tensor of a padded batch in eval mode, if its layers
        # had stock attention when it was built.
        sequences = x.unbind()
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=x.device)
        padded = torch.nested.to_padded_tensor(x, 0.0)
        is_padding = torch.arange(padded.shape[1], device=x.device) >= lengths[:, None]
        out = self._attend(padded, is_padding, is_causal)
        rows = [row[: len(sequence)] for row, sequence in zip(out, sequences, strict=True)]
        return torch.nested.as_nested_tensor(rows)


def _refuse_masks(**masks: Tensor | None) -> None:
    for name, mask in masks.items():
        if mask is not None:
            raise ValueError(
                f"A nested query takes neither key_padding_mask nor attn_mask, got {name}. Its "
                "lengths say what is padding; is_causal=True hides later keys."
            )


def _check_causal_mask(attn_mask: Tensor | None, seq_len: int) -> None:
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or float, got {attn_mask.dtype}.")
    if attn_mask.shape != (seq_len, seq_len):
        raise ValueError(
            "attn_mask must be (seq_len, seq_len), got "
            f"{tuple(attn_mask.shape)} for seq_len={seq_len}."
        )
    is_later = torch.ones_like(attn_mask, dtype=torch.bool).triu(1)
    causal = is_later
    if attn_mask.is_floating_point():
        causal = torch.zeros_like(attn_mask).masked_fill(is_later, float("-inf"))
    if not torch.equal(attn_mask, causal):
        num_other = int((attn_mask != causal).sum())
        raise NotImplementedError(
            "attn_mask must be the causal mask (nn.Transformer.generate_square_subsequent_mask), "
            f"got a {attn_mask.dtype} mask that differs from it in {num_other} of "
            f"{attn_mask.numel()} entries. Which keys are seen is the pattern's business; padding "
            "goes into key_padding_mask."
        )


def _bool_padding_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask must be (batch, seq_len) = {tuple(x.shape[:2])}, "
            f"got {tuple(mask.shape)}."
        )
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"key_padding_mask must be bool or float, got {mask.dtype}.")
    is_padding = mask == float("-inf")
    others = mask[~is_padding]
    if others.count_nonzero():
        raise ValueError(
            "A float key_padding_mask must hold 0 for tokens and -inf for padding, got "
            f"{others[others != 0][0].item()}. Pass a bool mask, True = padding."
        )
    return is_padding
