"""All initial values in one place: gains of Magneto and DeepNorm, and one function to set them.

| Weight | Initial value |
|---|---|
| `q_proj`, `k_proj` | Xavier normal, gain 1 |
| `v_proj`, `out_proj`, `fc1`, `fc2`, `gate` | Xavier normal, gain of `residual_gain` |
| embeddings | normal, standard deviation embed_dim^-0.5 |
| tables of relative biases | normal, standard deviation 0.02 |
| LayerNorm | weight 1 |
| every bias | 0 |

N encoder and M decoder layers give these gains and residual scales (Magneto, arXiv 2210.06423;
DeepNet, arXiv 2203.00555):

| Model | Part | Magneto gain | DeepNorm gain | DeepNorm residual scale |
|---|---|---|---|---|
| encoder only | encoder | sqrt(ln 2N) | (8N)^-1/4 | (2N)^1/4 |
| decoder only | decoder | sqrt(ln 2M) | (8M)^-1/4 | (2M)^1/4 |
| both | encoder | sqrt(ln 3M * ln 2N / 3) | 0.87 (N^4 M)^-1/16 | 0.81 (N^4 M)^1/16 |
| both | decoder | sqrt(ln 3M) | (12M)^-1/4 | (3M)^1/4 |

Pre-LN has gain and scale 1.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from torch import nn

from .block import Norm
from .positions import RelativeBias

__all__ = ["initialize_weights", "residual_gain", "residual_scale"]

Part = Literal["encoder", "decoder"]

# Linear layers by the last part of their name: whether the gain of the norm scheme applies.
_LINEAR_HAS_GAIN = {
    "q_proj": False,
    "k_proj": False,
    "v_proj": True,
    "out_proj": True,
    "fc1": True,
    "gate": True,
    "fc2": True,
}
_RELATIVE_BIAS_STD = 0.02


def initialize_weights(module: nn.Module, *, gain: float) -> None:
    """Sets every weight of a stack, block or layer to its initial value, in place.

    Call it once, at the end of a constructor: a later `apply` of another initialisation would
    silently undo the gains, as in several published models.

    Args:
        module: Module whose linear layers have the names of the table.
        gain: Gain of the weights on the residual path, from `residual_gain`.

    Raises:
        ValueError: If a linear layer or another module with parameters is not in the table.
    """
    relative_tables = {m.embedding for m in module.modules() if isinstance(m, RelativeBias)}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            role = re.sub(r"\.experts\.\d+$", "", name).rpartition(".")[2]
            if role not in _LINEAR_HAS_GAIN:
                raise ValueError(
                    f"initialize_weights knows the linear layers {tuple(_LINEAR_HAS_GAIN)}, "
                    f"got {name!r}."
                )
            nn.init.xavier_normal_(child.weight, gain=gain if _LINEAR_HAS_GAIN[role] else 1.0)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            is_relative = child in relative_tables
            std = _RELATIVE_BIAS_STD if is_relative else child.embedding_dim**-0.5
            nn.init.normal_(child.weight, std=std)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
        elif next(child.parameters(recurse=False), None) is not None:
            raise ValueError(
                "initialize_weights knows Linear, Embedding and LayerNorm, got "
                f"{type(child).__name__} at {name!r}."
            )


def residual_gain(
    norm: Norm, *, part: Part, num_encoder_layers: int = 0, num_decoder_layers: int = 0
) -> float:
    """Computes the gain of `v_proj`, `out_proj`, `fc1`, `fc2` and `gate`.

    Args:
        norm: Norm scheme of the blocks.
        part: Which part the weights belong to.
        num_encoder_layers: Layers of the encoder, 0 for a decoder-only model.
        num_decoder_layers: Layers of the decoder, 0 for an encoder-only model.

    Raises:
        ValueError: If the part has no layers.
    """
    own, is_both = _count_layers(part, num_encoder_layers, num_decoder_layers)
    if norm == "pre_ln":
        return 1.0
    if norm == "sub_ln":
        if not is_both:
            return math.sqrt(math.log(2 * own))
        if part == "decoder":
            return math.sqrt(math.log(3 * num_decoder_layers))
        decoder_factor = math.log(3 * num_decoder_layers) / 3
        return math.sqrt(decoder_factor * math.log(2 * num_encoder_layers))
    if not is_both:
        return (8 * own) ** -0.25
    if part == "decoder":
        return (12 * num_decoder_layers) ** -0.25
    return 0.87 * (num_encoder_layers**4 * num_decoder_layers) ** (-1 / 16)


def residual_scale(
    norm: Norm, *, part: Part, num_encoder_layers: int = 0, num_decoder_layers: int = 0
) -> float:
    """Computes DeepNorm's factor of the residual; 1 for the other schemes.

    Args:
        norm: Norm scheme of the blocks.
        part: Which part the blocks belong to.
        num_encoder_layers: Layers of the encoder, 0 for a decoder-only model.
        num_decoder_layers: Layers of the decoder, 0 for an encoder-only model.

    Raises:
        ValueError: If the part has no layers.
    """
    own, is_both = _count_layers(part, num_encoder_layers, num_decoder_layers)
    if norm != "deepnorm":
        return 1.0
    if not is_both:
        return (2 * own) ** 0.25
    if part == "decoder":
        return (3 * num_decoder_layers) ** 0.25
    return 0.81 * (num_encoder_layers**4 * num_decoder_layers) ** (1 / 16)


def _count_layers(part: Part, num_encoder_layers: int, num_decoder_layers: int) -> tuple[int, bool]:
    own = num_encoder_layers if part == "encoder" else num_decoder_layers
    other = num_decoder_layers if part == "encoder" else num_encoder_layers
    if own < 1 or other < 0:
        raise ValueError(
            f"part={part!r} needs num_{part}_layers of at least 1, got {num_encoder_layers=} "
            f"and {num_decoder_layers=}."
        )
    return own, other > 0
