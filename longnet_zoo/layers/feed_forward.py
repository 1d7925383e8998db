"""Feed-forward network of a Transformer block: GELU or SwiGLU, with Magneto's inner LayerNorm."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Activation", "FeedForward"]

Activation = Literal["gelu", "swiglu"]


class FeedForward(nn.Module):
    """Two linear layers with an activation, and optionally a LayerNorm, between them.

    `"gelu"`: fc2(norm(gelu(fc1(x)))), the exact GELU. `"swiglu"` (arXiv 2002.05202):
    fc2(norm(silu(gate(x)) * fc1(x))). Dropout acts on the hidden activation, before the norm.
    Without gradients the hidden channels exist for some positions at a time only.

    Args:
        embed_dim: Channels in and out.
        ffn_dim: Hidden channels.
        activation: `"gelu"` or `"swiglu"`.
        sub_ln: Whether a LayerNorm comes before fc2 (Magneto, arXiv 2210.06423).
        bias: Whether the linear layers have a bias.
        dropout: Dropout of the hidden activation, in [0, 1).
        eps: Epsilon of the LayerNorm.

    Raises:
        ValueError: If a size is below 1, `activation` unknown or `dropout` outside [0, 1).
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        ffn_dim: int,
        activation: Activation = "gelu",
        sub_ln: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or ffn_dim < 1:
            raise ValueError(
                f"embed_dim and ffn_dim must be at least 1, got {embed_dim=} and {ffn_dim=}."
            )
        if activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {get_args(Activation)}, got {activation!r}."
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        self.fc1 = nn.Linear(embed_dim, ffn_dim, bias=bias)
        self.gate = nn.Linear(embed_dim, ffn_dim, bias=bias) if activation == "swiglu" else None
        self.dropout = nn.Dropout(dropout)
        self.inner_norm = nn.LayerNorm(ffn_dim, eps=eps) if sub_ln else None
        self.fc2 = nn.Linear(ffn_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each position by itself: (batch, seq_len, embed_dim) to the same shape."""
        rows_at_once = max(1, _hidden_at_once(x) // self.fc1.out_features)
        num_rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or num_rows <= rows_at_once:
            return self._feed(x)
        parts = x.reshape(num_rows, -1).split(rows_at_once)
        return torch.cat([self._feed(part) for part in parts]).view_as(x)

    def _feed(self, x: Tensor) -> Tensor:
        # torch's kernels of both activations compute half types in float32 and round once.
        if self.gate is None:
            hidden = functional.gelu(self.fc1(x))
        else:
            hidden = functional.silu(self.gate(x)) * self.fc1(x)
        hidden = self.dropout(hidden)
        if self.inner_norm is not None:
            hidden = self.inner_norm(hidden)
        return self.fc2(hidden)


def _hidden_at_once(x: Tensor) -> int:
    """Hidden activations that exist at once: on a CPU what stays in its caches."""
    return 2**22 if x.device.type == "cpu" else 2**27
