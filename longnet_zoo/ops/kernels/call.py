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
        capability: Compute capability of an NVIDIA GPU, such as (9, 0); None elsewhere.
        is_backward: Whether gradients are computed.
        has_dense_bias: Whether a tensor of pairs is added to the logits.
        has_distance_bias: Whether a function of distances is added to the logits.
        has_hidden_keys: Whether there is padding other than at the end of a row.
        has_unnested_xpos: Whether each branch has its own xPos factors, since its segments do not
            nest in the longest one.
        has_dropout: Whether attention dropout is active.
        has_lse_grad: Whether a gradient flows in through the LSE.
        is_block: Whether a block of another schedule is to be attended, not a whole problem.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None = None
    is_backward: bool = False
    has_dense_bias: bool = False
    has_distance_bias: bool = False
    has_hidden_keys: bool = False
    has_unnested_xpos: bool = False
    has_dropout: bool = False
    has_lse_grad: bool = False
    is_block: bool = False

    def below_capability(self, needed: tuple[int, int]) -> str | None:
        """Says that an NVIDIA GPU is too old for a kernel, or None."""
        if self.capability is None or self.capability >= needed:
            return None
        found, wanted = (".".join(map(str, x)) for x in (self.capability, needed))
        return f"needs compute capability {wanted}, got {found}"

    def beyond_fused(self) -> str | None:
        """Says which property kernels of plain attention do not serve, or None."""
        for is_asked, what in (
            (self.has_dense_bias, "a bias by pairs of positions"),
            (self.has_distance_bias, "a bias by distance"),
            (self.has_hidden_keys, "padding before or between tokens"),
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
        is_kv_shared: Whether the heads of k and v are one head, repeated with stride zero. Its
            gradients may come summed, with one head.
        bias: What is added to the logits.
        dropout: Attention dropout.
    """

    scale: float
    is_causal: bool
    is_kv_shared: bool = False
    bias: LogitBias | None = None
    dropout: Dropout | None = None
