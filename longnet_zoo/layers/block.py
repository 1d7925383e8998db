"""One Transformer block: attention and feed-forward with residuals, in three norm schemes.

- `"sub_ln"` (Magneto, arXiv 2210.06423): x + f(norm(x)); f has a second LayerNorm inside, before
  its output projection.
- `"pre_ln"` (arXiv 2002.04745): the same without the inner norms.
- `"deepnorm"` (DeepNet, arXiv 2203.00555): norm(residual_scale * x + f(x)).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from longnet_zoo.ops.dilated_attention import dilated_attention

from .attention import AttentionOp, DilatedAttention
from .memory import (
    MemorySaving,
    SecondRun,
    check_not_compiled,
    run_again_in_backward,
    run_in_chunks,
)
from .multiway import Multiway, Route, make_multiway, run_routed
from .spans import Surroundings

__all__ = ["Norm", "TransformerBlock"]

Norm = Literal["sub_ln", "pre_ln", "deepnorm"]
_Skips = tuple[Tensor | None, Tensor | None]


class TransformerBlock(nn.Module):
    """Joins an attention and a feed-forward module by norms and residual connections.

    The inner norms of `"sub_ln"` belong to the two modules (their option `sub_ln`). The initial
    gains and `residual_scale` depend on the depth: `TransformerStack` sets both. For blocks of your
    own call `initialize_weights` with `residual_gain`, and pass what `residual_scale` returns.

    The attribute `memory_saving` says how training saves memory; None, as at first: not at all.

    Args:
        attention: Module called with x and the keyword arguments of `forward`.
        feed_forward: Module called with x.
        embed_dim: Channels in and out.
        norm: `"sub_ln"`, `"pre_ln"` or `"deepnorm"`.
        residual_scale: Factor of the residual in `"deepnorm"`; 1 otherwise.
        dropout: Dropout of what both modules return, in [0, 1).
        drop_path: Probability per sample and module to skip it in training, in [0, 1).
        eps: Epsilon of the LayerNorms.
        num_modalities: Number of modalities with norms of their own.

    Raises:
        ValueError: If an option is outside its range, or a module's inner norm does not fit `norm`.
    """

    def __init__(
        self,
        *,
        attention: nn.Module,
        feed_forward: nn.Module,
        embed_dim: int,
        norm: Norm = "sub_ln",
        residual_scale: float = 1.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        num_modalities: int = 1,
    ) -> None:
        super().__init__()
        _check_options(norm, residual_scale, dropout, drop_path)
        for name, module in (("attention", attention), ("feed_forward", feed_forward)):
            one = module.experts[0] if isinstance(module, Multiway) else module
            has_inner_norm = getattr(one, "inner_norm", None) is not None
            if has_inner_norm != (norm == "sub_ln"):
                raise ValueError(
                    f"norm={norm!r} needs {name} with sub_ln={norm == 'sub_ln'}, "
                    f"got one with sub_ln={has_inner_norm}."
                )
        self.memory_saving: MemorySaving | None = None
        self.norm = norm
        self.residual_scale = residual_scale
        make_norm = partial(make_multiway, partial(nn.LayerNorm, embed_dim, eps=eps))
        self.attention_norm = make_norm(num_modalities)
        self.attention = attention
        self.ffn_norm = make_norm(num_modalities)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        position_bias: nn.Module | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        route: Route | None = None,
        attention_op: AttentionOp | None = None,
    ) -> Tensor:
        """Runs the block: (batch, seq_len, embed_dim) to the same shape.

        Args:
            x: Input, (batch, seq_len, embed_dim).
            rotary: As for `DilatedAttention`.
            position_bias: As for `DilatedAttention`.
            key_padding_mask: As for `DilatedAttention`.
            cu_seqlens: As for `DilatedAttention`.
            route: As for `DilatedAttention`.
            attention_op: As for `DilatedAttention`.

        Returns:
            Output, (batch, seq_len, embed_dim).

        Raises:
            NotImplementedError: If `memory_saving` has options that cannot be compiled.
        """
        around = Surroundings(
            rotary=rotary,
            position_bias=position_bias,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            route=route,
            attention_op=attention_op,
        )
        # Drawn here, since all parts of a sample share it.
        skips = self._draw_skip(x), self._draw_skip(x)
        saving = self.memory_saving
        is_compiled = torch.compiler.is_compiling()
        # Nothing is kept without a backward pass, and a compiler has its own plan of the memory.
        if saving is None or (is_compiled and not torch.is_grad_enabled()):
            return self._feed(self._attend(x, around, skips[0]), skips[1], route=route)
        if is_compiled:
            check_not_compiled(saving)
        run = partial(self._run, skips=skips, saving=saving)
        outs = [
            run_again_in_backward(partial(run, around=part_around), part, saving)
            for part, part_around in self._independent_parts(x, around, saving)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def extra_repr(self) -> str:
        """Lists the options."""
        return f"norm={self.norm!r}, residual_scale={self.residual_scale}"

    def _run(
        self,
        x: Tensor,
        second_run: SecondRun,
        *,
        around: Surroundings,
        skips: _Skips,
        saving: MemorySaving,
    ) -> Tensor:
        """Runs the block on tokens that attend to no others."""
        x = self._attend(x, around, skips[0])
        feed = partial(self._feed, skip=skips[1])
        size = saving.chunk_size
        if size is None:
            return feed(x, route=around.route)
        return run_in_chunks(feed, x, around.route, chunk_size=size, second_run=second_run)

    def _independent_parts(
        self, x: Tensor, around: Surroundings, saving: MemorySaving
    ) -> list[tuple[Tensor, Surroundings]]:
        """Cuts the sequence where no attention crosses, if that is known."""
        attention = self.attention
        if (
            saving.chunk_size is None
            or not isinstance(attention, DilatedAttention)
            # Another op may attend to a prefix, or to tokens that other processes have.
            or (around.attention_op or attention.attention_op) is not dilated_attention
            or not attention.pattern.is_nested
            # Zero keys fill a segment up to a length that depends on the whole sequence.
            or attention.pattern.padded_keys != "ignore"
            or attention.extra_branches  # which know no segments
        ):
            return [(x, around)]
        return around.split(
            x,
            segment_length=attention.pattern.segment_lengths[-1],
            min_length=max(1, saving.chunk_size // max(1, len(x))),
        )

    def _attend(self, x: Tensor, around: Surroundings, skip: Tensor | None) -> Tensor:
        is_post_norm = self.norm == "deepnorm"
        attended = self.attention(
            x if is_post_norm else run_routed(self.attention_norm, x, around.route),
            rotary=around.rotary,
            position_bias=around.position_bias,
            key_padding_mask=around.key_padding_mask,
            cu_seqlens=around.cu_seqlens,
            route=around.route,
            attention_op=around.attention_op,
        )
        x = self._add(x, attended, skip)
        return run_routed(self.attention_norm, x, around.route) if is_post_norm else x

    def _feed(self, x: Tensor, skip: Tensor | None, *, route: Route | None) -> Tensor:
        is_post_norm = self.norm == "deepnorm"
        fed = x if is_post_norm else run_routed(self.ffn_norm, x, route)
        x = self._add(x, run_routed(self.feed_forward, fed, route), skip)
        return run_routed(self.ffn_norm, x, route) if is_post_norm else x

    def _add(self, residual: Tensor, update: Tensor, skip: Tensor | None) -> Tensor:
        if self.norm == "deepnorm":
            residual = residual * self.residual_scale
        update = self.dropout(update)
        return residual + (update if skip is None else update * skip)

    def _draw_skip(self, x: Tensor) -> Tensor | None:
        """Draws which samples skip a module: factors (b, 1, 1), or None for no drop path."""
        if isinstance(self.drop_path, nn.Identity):
            return None
        return self.drop_path(x.new_ones(len(x), 1, 1))


def _check_options(norm: str, residual_scale: float, dropout: float, drop_path: float) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}.")
    if norm != "deepnorm" and residual_scale != 1.0:
        raise ValueError(
            f"residual_scale is for norm='deepnorm', got residual_scale={residual_scale} with "
            f"norm={norm!r}."
        )
    for name, value in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")
