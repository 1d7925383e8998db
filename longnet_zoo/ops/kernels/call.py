"""What a kernel is asked for: before the call, so that it can refuse, and in the call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .bias import LogitBias

__all__ = ["BlockOptions", "Call", "Dropout"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """Properties of an attention call that decide which kernels can run it.

    Attributes:
        device_type: `torch.device.type` of the tensors.
        dtype: Dtype of queries, keys and values.
        head_dim: Size of a head.
        has_bias: Whether anything is added to the logits, hidden keys included.
        has_dropout: Whether attention dropout is active.
        has_lse_grad: Whether a gradient flows in through the LSE.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    has_bias: bool = False
    has_dropout: bool = False
    has_lse_grad: bool = False

    def beyond_fused(self) -> str | None:
        """Says which property PyTorch's fused kernels do not serve, or None."""
        for is_asked, what in (
            (self.has_bias, "additive logits (bias, ALiBi, masks other than right padding)"),
            (self.has_dropout, "attention dropout"),
            (self.has_lse_grad, "a gradient through the LSE"),
        ):
            if is_asked:
                return f"does not support {what}"
        return None


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Attention dropout of one kernel call, the same whenever it is drawn again.

    Attributes:
        probability: Share of the attention weights that is set to zero.
        seed: Seed of the attention op, and number of this kernel call in it.
    """

    probability: float
    seed: tuple[int, int]

    def factors(self, shape: torch.Size, start: int, device: torch.device) -> torch.Tensor:
        """Draws 0 or 1 / (1 - p) for attention weights of `shape`, of the rows from `start` on."""
        # Hashed, since the CPU generator reads 32 bits only: near or regular seeds would collide.
        seed = hash((*self.seed, start)) % 2**63
        generator = torch.Generator(device).manual_seed(seed)
        kept = 1.0 - self.probability
        draws = torch.rand(shape, generator=generator, device=device)
        return (draws < kept) / kept


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """How a block is attended.

    Attributes:
        scale: Factor on the dot products.
        is_causal: Whether row i sees the keys up to i only.
        bias: What is added to the logits.
        dropout: Attention dropout.
    """

    scale: float
    is_causal: bool
    bias: LogitBias | None = None
    dropout: Dropout | None = None
