"""One Transformer block: attention and feed-forward with residuals, in three norm schemes.

- `"sub_ln"` (Magneto, arXiv 2210.06423): x + f(norm(x)); f has a second LayerNorm inside, before
  its output projection.
- `"pre_ln"` (arXiv 2002.04745): the same without the inner norms.
- `"deepnorm"` (DeepNet, arXiv 2203.00555): norm(residual_scale * x + f(x)).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

from timm.layers import DropPath
from torch import Tensor, nn

from .multiway import Multiway, Route, make_multiway, run_routed

__all__ = ["Norm", "TransformerBlock"]

Norm = Literal["sub_ln", "pre_ln", "deepnorm"]


class TransformerBlock(nn.Module):
    """Joins an attention and a feed-forward module by norms and residual connections.

    The inner norms of `"sub_ln"` belong to the two modules (their option `sub_ln`). The initial
    gains and `residual_scale` depend on the depth: `TransformerStack` sets both. For blocks of your
    own call `initialize_weights` with `residual_gain`, and pass what `residual_scale` returns.

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
    ) -> Tensor:
        """Runs the block: (batch, seq_len, embed_dim) to the same shape.

        Args:
            x: Input, (batch, seq_len, embed_dim).
            rotary: As for `DilatedAttention`.
            position_bias: As for `DilatedAttention`.
            key_padding_mask: As for `DilatedAttention`.
            cu_seqlens: As for `DilatedAttention`.
            route: As for `DilatedAttention`.

        Returns:
            Output, (batch, seq_len, embed_dim).
        """
        is_post_norm = self.norm == "deepnorm"
        attended = self.attention(
            x if is_post_norm else run_routed(self.attention_norm, x, route),
            rotary=rotary,
            position_bias=position_bias,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            route=route,
        )
        x = self._add(x, attended)
        if is_post_norm:
            x = run_routed(self.attention_norm, x, route)
        fed = x if is_post_norm else run_routed(self.ffn_norm, x, route)
        x = self._add(x, run_routed(self.feed_forward, fed, route))
        return run_routed(self.ffn_norm, x, route) if is_post_norm else x

    def extra_repr(self) -> str:
        """Lists the options."""
        return f"norm={self.norm!r}, residual_scale={self.residual_scale}"

    def _add(self, residual: Tensor, update: Tensor) -> Tensor:
        if self.norm == "deepnorm":
            residual = residual * self.residual_scale
        return residual + self.drop_path(self.dropout(update))


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
