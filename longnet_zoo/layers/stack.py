"""A stack of Transformer blocks, the body of every model.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from longnet_zoo.ops.branches import ConfiguredBranch, make_branches
from longnet_zoo.ops.pattern import DilatedPattern

from .attention import AttentionOp, DilatedAttention, Position, make_position_bias, make_rotary
from .block import Norm, TransformerBlock
from .feed_forward import Activation, FeedForward
from .initialization import initialize_weights, residual_gain, residual_scale
from .memory import MemorySaving
from .multiway import Route, make_multiway, run_routed

__all__ = ["TransformerStack"]


class TransformerStack(nn.Module):
    """Blocks in a row, with one set of rotary tables or one bias module for all of them.

    Weights have their final initial values after construction (Magneto's or DeepNorm's gains).
    With `"deepnorm"` each block ends in a norm, so there is no final one.

    Args:
        embed_dim: Channels in and out.
        num_layers: Number of blocks.
        num_heads: Number of query heads.
        ffn_dim: Hidden channels of the feed-forward network.
        pattern: Segment lengths and dilation rates.
        is_causal: Whether a query sees no later key.
        num_kv_heads: Number of key and value heads, as for `DilatedAttention`.
        position: `"xpos"`, `"rotary"`, `"alibi"`, `"relative"` or None.
        rotary_base: As for `DilatedAttention`.
        xpos_scale_base: As for `DilatedAttention`.
        relative_buckets: As for `DilatedAttention`; the table is shared by all layers.
        relative_max_distance: As for `DilatedAttention`.
        norm: `"sub_ln"`, `"pre_ln"` or `"deepnorm"`.
        activation: `"gelu"` or `"swiglu"`.
        qk_norm: Whether queries and keys pass a LayerNorm.
        bias: Whether linear layers have a bias.
        dropout: Dropout of what attention and feed-forward return, in [0, 1).
        attention_dropout: Dropout of the attention weights, in [0, 1).
        activation_dropout: Dropout of the feed-forward's hidden activation, in [0, 1).
        drop_path: Drop-path rate of the last block, in [0, 1); it grows linearly from 0.
        eps: Epsilon of the LayerNorms.
        backend: Attention kernel.
        final_norm: Whether a LayerNorm comes after the last block; never with `"deepnorm"`.
        num_modalities: Number of modalities with linear layers and norms of their own (multiway).
        extra_branches: As for `DilatedAttention`. Each layer draws random blocks and hashes of its
            own, by a seed that is made of that of the branch and the layer's number.

    Raises:
        ValueError: If `num_layers` is below 1 or another option is outside its range.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        pattern: DilatedPattern,
        is_causal: bool = False,
        num_kv_heads: int | None = None,
        position: Position | None = "xpos",
        rotary_base: float = 10000.0,
        xpos_scale_base: float = 512.0,
        relative_buckets: int = 32,
        relative_max_distance: int = 128,
        norm: Norm = "sub_ln",
        activation: Activation = "gelu",
        qk_norm: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        backend: str = "auto",
        final_norm: bool = True,
        num_modalities: int = 1,
        extra_branches: Sequence[ConfiguredBranch] = (),
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
        self.embed_dim, self.num_modalities = embed_dim, num_modalities
        gain, scale = _gain_and_scale(norm, is_causal, num_layers)
        # The stack owns the one bias module of all layers.
        own_position = None if position in ("alibi", "relative") else position
        shared: dict[str, Any] = {"sub_ln": norm == "sub_ln", "bias": bias, "eps": eps}
        attend = partial(DilatedAttention, embed_dim=embed_dim, num_heads=num_heads, **shared)
        attend = partial(attend, pattern=pattern, is_causal=is_causal, num_kv_heads=num_kv_heads)
        attend = partial(attend, rotary_base=rotary_base, xpos_scale_base=xpos_scale_base)
        attend = partial(attend, qk_norm=qk_norm, dropout=attention_dropout, backend=backend)
        attend = partial(attend, position=own_position, num_modalities=num_modalities)
        attentions = (attend(extra_branches=x) for x in _by_layer(extra_branches, num_layers))
        feed = partial(FeedForward, embed_dim=embed_dim, ffn_dim=ffn_dim, activation=activation)
        feed = partial(feed, dropout=activation_dropout, **shared)
        make_feed = partial(make_multiway, feed, num_modalities)
        make_block = partial(TransformerBlock, embed_dim=embed_dim, norm=norm, residual_scale=scale)
        make_block = partial(make_block, dropout=dropout, eps=eps, num_modalities=num_modalities)
        self.blocks = nn.ModuleList(
            make_block(attention=own, feed_forward=make_feed(), drop_path=rate)
            for own, rate in zip(attentions, _linear_rates(drop_path, num_layers), strict=True)
        )
        last_norm = partial(nn.LayerNorm, embed_dim, eps=eps)
        has_norm = final_norm and norm != "deepnorm"
        self.norm = make_multiway(last_norm, num_modalities) if has_norm else None
        self.rotary = make_rotary(position, embed_dim // num_heads, rotary_base)
        self.position_bias = make_position_bias(
            position, num_heads, relative_buckets, relative_max_distance, is_causal
        )
        initialize_weights(self, gain=gain)

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        route: Route | None = None,
        attention_ops: Sequence[AttentionOp] | None = None,
        num_blocks: int | None = None,
        return_hidden_states: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        route: Route | None = None,
        attention_ops: Sequence[AttentionOp] | None = None,
        num_blocks: int | None = None,
        return_hidden_states: Literal[True] | Sequence[int],
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        route: Route | None = None,
        attention_ops: Sequence[AttentionOp] | None = None,
        num_blocks: int | None = None,
        return_hidden_states: bool | Sequence[int] = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Runs all blocks and the final norm.

        Args:
            x: Embeddings, (batch, seq_len, embed_dim).
            positions: Absolute positions of `x`, (seq_len,), for xPos and rotary; None: from 0.
                Segments are counted from the first row of `x` all the same.
            key_padding_mask: Bool (batch, seq_len), True = padding.
            cu_seqlens: Boundaries of packed sequences, int32 (num_sequences + 1,), for batch 1.
            route: The modality of every token, for a multiway stack.
            attention_ops: Op of each block, for this call alone; None: those of the layers.
            num_blocks: How many blocks to run, from the first on; None: all.
            return_hidden_states: Whether to return the embeddings (state 0) and the output of each
                block, before the final norm, as well; or the numbers of the states to return.

        Returns:
            Output, (batch, seq_len, embed_dim), and if asked for, hidden states of the same shape
            in their order.

        Raises:
            ValueError: If `x` has another shape, `positions` are given to a stack without
                rotary positions, or a `route` to one without modalities.
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must be (batch, seq_len, embed_dim) with embed_dim={self.embed_dim}, "
                f"got {tuple(x.shape)}."
            )
        if route is not None and self.num_modalities == 1:
            raise ValueError(
                f"route is for a multiway stack, got one of {len(route.lengths)} modalities for a "
                "stack with num_modalities=1."
            )
        rotary = self._rotary_tables(x, positions)
        wanted: Sequence[int] = ()
        if not isinstance(return_hidden_states, bool):
            wanted = return_hidden_states
        elif return_hidden_states:
            wanted = range(len(self.blocks) + 1)
        hidden_states = [x] if 0 in wanted else []
        for number, block in enumerate(islice(self.blocks, num_blocks), start=1):
            x = block(
                x,
                rotary=rotary,
                position_bias=self.position_bias,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
                route=route,
                attention_op=None if attention_ops is None else attention_ops[number - 1],
            )
            if number in wanted:
                hidden_states.append(x)
        if self.norm is not None:
            x = run_routed(self.norm, x, route)
        return x if return_hidden_states is False else (x, hidden_states)

    def set_memory_saving(self, saving: MemorySaving | None) -> None:
        """Chooses how training saves memory, for every block.

        Args:
            saving: The options; None: not at all, which is fastest.

        Raises:
            TypeError: If it is none of these.
        """
        if saving is not None and not isinstance(saving, MemorySaving):
            raise TypeError(f"saving must be a MemorySaving or None, got {saving!r}.")
        for module in self.blocks.modules():  # also inside of wrappers
            if isinstance(module, TransformerBlock):
                module.memory_saving = saving

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Chooses whether whole blocks are computed again in the backward pass, by timm's name."""
        self.set_memory_saving(MemorySaving(chunk_size=None) if enable else None)

    def _rotary_tables(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if self.rotary is None:
            if positions is not None:
                raise ValueError(
                    "positions need position='xpos' or 'rotary', got positions of "
                    f"{tuple(positions.shape)} for a stack without. Leave positions=None."
                )
            return None
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        return self.rotary(positions)


def _gain_and_scale(norm: Norm, is_causal: bool, num_layers: int) -> tuple[float, float]:
    if is_causal:
        gain = residual_gain(norm, part="decoder", num_decoder_layers=num_layers)
        return gain, residual_scale(norm, part="decoder", num_decoder_layers=num_layers)
    gain = residual_gain(norm, part="encoder", num_encoder_layers=num_layers)
    return gain, residual_scale(norm, part="encoder", num_encoder_layers=num_layers)


def _by_layer(
    branches: Sequence[ConfiguredBranch], num_layers: int
) -> list[list[ConfiguredBranch]]:
    made = make_branches(branches)
    return [[branch.for_layer(layer) for branch in made] for layer in range(num_layers)]


def _linear_rates(drop_path: float, num_layers: int) -> list[float]:
    return [drop_path * depth / max(num_layers - 1, 1) for depth in range(num_layers)]
