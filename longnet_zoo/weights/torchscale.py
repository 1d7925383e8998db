"""Weights of microsoft/torchscale's Encoder, Decoder, LongNetEncoder and LongNetDecoder, both ways.

torchscale's names appear in this file only. What it computes differently from the paper comes with
the config: heads start their steps in blocks and incomplete segments are filled with zero keys
(`head_offset="block"`, `padded_keys="zero"`), because its weights were trained so. Facts from
torchscale's `architecture/{config,encoder,decoder}.py` and `component/`, commit 4d1e0e8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longnet_zoo.models import LongNetLM, LongNetLMConfig, LongNetMLM, TextConfig
from longnet_zoo.ops.pattern import DENSE_SEGMENT
from longnet_zoo.ops.positions import xpos_zeta

from .keys import Converter, layer_names, refuse_unpublished
from .load import load_state_dict
from .torchscale_config import config_from_torchscale

__all__ = [
    "CONVERTER",
    "config_from_torchscale",
    "convert_torchscale_state_dict",
    "model_from_torchscale",
    "to_torchscale_state_dict",
]

# Every module but the table of relative positions comes with `.weight`, and all but embeddings,
# head and table with `.bias`.
_OUTER_NAMES = {
    "embed_tokens": "embedding",
    "layer_norm": "stack.norm",
    "output_projection": "head",
}
_RELATIVE_NAME = "stack.position_bias.embedding"
_ENCODER_NAMES = {**_OUTER_NAMES, "relative_position.relative_attention_bias": _RELATIVE_NAME}
_DECODER_NAMES = {
    **_OUTER_NAMES,
    "self_attn_relative_position.relative_attention_bias": _RELATIVE_NAME,
}

_EMBEDDING = "embed_tokens.weight"
_HEAD = "output_projection.weight"
_ZETA_TOLERANCE = 1e-6


def convert_torchscale_state_dict(
    state_dict: Mapping[str, Tensor], config: TextConfig
) -> dict[str, Tensor]:
    """Renames published weights for the model that a config describes.

    Args:
        state_dict: Weights under torchscale's names.
        config: Config of our model, as `config_from_torchscale` makes it.

    Returns:
        Weights under our names. Buffers of xPos are compared with our constants and left out, and
        so is a tied head.

    Raises:
        ValueError: If a key has no counterpart in this model (all such keys are listed), a buffer
            has another value, the weights were trained with other positions, or a head that
            should be tied differs from the embedding.
    """
    names = _key_table(config)
    zeta_keys = _zeta_keys(config)
    unknown = sorted(state_dict.keys() - names.keys() - zeta_keys - {_HEAD})
    if _HEAD in state_dict and config.head_size == 0:
        unknown.append(_HEAD)
    if unknown:
        raise ValueError(
            f"torchscale keys without a counterpart in {type(config).__name__}: "
            f"{', '.join(unknown)}. Check the config: norm={config.norm!r}, "
            f"position={config.position!r}, num_layers={config.num_layers}, "
            f"vocab_size={config.vocab_size}, num_outputs={config.num_outputs}."
        )
    _check_position(state_dict, config)
    _check_zetas({key: state_dict[key] for key in zeta_keys & state_dict.keys()}, config)
    _check_tied_head(state_dict, config)
    converted = {names[key]: tensor for key, tensor in state_dict.items() if key in names}
    table_key = f"{_RELATIVE_NAME}.weight"
    if config.is_causal and table_key in converted:
        # torchscale makes buckets for both directions in a decoder too; later keys never come up.
        converted[table_key] = converted[table_key][: config.relative_buckets]
    return converted


def to_torchscale_state_dict(model: LongNetLM | LongNetMLM) -> dict[str, Tensor]:
    """Renames our weights for torchscale; the inverse of `convert_torchscale_state_dict`.

    Args:
        model: A model with options that torchscale has as well.

    Returns:
        Weights and buffers under torchscale's names, sharing memory with the model.

    Raises:
        NotImplementedError: If torchscale would compute something else with these weights.
    """
    config = model.config
    _check_torchscale_has(config)
    published = {ours: key for key, ours in _key_table(config).items()}
    renamed = {published[key]: tensor for key, tensor in model.state_dict().items()}
    if config.has_tied_head:
        renamed[_HEAD] = renamed[_EMBEDDING]
    if config.position == "relative" and config.is_causal:
        key = next(key for key in renamed if key.startswith("self_attn_relative_position"))
        renamed[key] = torch.cat([renamed[key], torch.zeros_like(renamed[key])])
    for key in _zeta_keys(config):
        renamed[key] = xpos_zeta(config.head_dim).to(torch.float32)
    return renamed


def model_from_torchscale(
    state_dict: Mapping[str, Tensor], config: Mapping[str, object]
) -> LongNetLM | LongNetMLM:
    """Makes our model of a torchscale config and loads published weights into it, strictly.

    Args:
        state_dict: Weights under torchscale's names.
        config: torchscale's options by name, as for `config_from_torchscale`.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If keys are missing, left over or of another shape.
        NotImplementedError: If the config asks for what our models do not have.

    Example:
        >>> model = model_from_torchscale(state_dict, {"decoder_layers": 12, "vocab_size": 50_000})
    """
    ours = config_from_torchscale(config)
    model = LongNetLM(ours) if isinstance(ours, LongNetLMConfig) else LongNetMLM(ours)
    converted = convert_torchscale_state_dict(state_dict, ours)
    load_state_dict(model, converted, source="the converted torchscale state dict")
    return model


CONVERTER = Converter(
    is_published=lambda state_dict: any(key.startswith("layers.") for key in state_dict),
    from_published=convert_torchscale_state_dict,
    to_published=to_torchscale_state_dict,
    options={"head_offset": "block", "padded_keys": "zero"},
)


def _key_table(config: TextConfig) -> dict[str, str]:
    """Published key -> our key, for all keys of the model that the config describes."""
    outer = _DECODER_NAMES if config.is_causal else _ENCODER_NAMES
    names = layer_names(
        config.num_layers,
        published="layers",
        ours="stack.blocks",
        has_inner_norms=config.norm == "sub_ln",
    )
    is_present = {
        "embedding": config.vocab_size is not None,
        "stack.norm": config.norm != "deepnorm",
        "head": config.head_size > 0 and not config.has_tied_head,
        _RELATIVE_NAME: config.position == "relative",
    }
    names |= {published: ours for published, ours in outer.items() if is_present[ours]}
    keys = {f"{published}.weight": f"{ours}.weight" for published, ours in names.items()}
    keys |= {
        f"{published}.bias": f"{ours}.bias"
        for published, ours in names.items()
        if ours not in ("embedding", "head", _RELATIVE_NAME)
    }
    return keys


def _zeta_keys(config: TextConfig) -> set[str]:
    layers = range(config.num_layers) if config.position == "xpos" else range(0)
    return {f"layers.{layer}.self_attn.xpos.scale" for layer in layers}


def _check_position(state_dict: Mapping[str, Tensor], config: TextConfig) -> None:
    """Refuses positions that the weights were not trained with, for which no key would be missed.

    Checkpoints with xPos hold its constants; those without have a relative bias, or no positions.
    """
    if config.position in ("rotary", "alibi") or (
        config.position == "xpos" and not _zeta_keys(config) & state_dict.keys()
    ):
        raise ValueError(
            "torchscale weights without xPos constants need position='relative' or None, got "
            f"position={config.position!r}. Pass the one they were trained with."
        )


def _check_zetas(buffers: Mapping[str, Tensor], config: TextConfig) -> None:
    for key, buffer in buffers.items():
        zeta = xpos_zeta(config.head_dim)
        if buffer.shape != zeta.shape:
            raise ValueError(
                f"{key} must hold one number per channel pair, ({len(zeta)},) for head_dim="
                f"{config.head_dim}, got {tuple(buffer.shape)}. Check num_heads."
            )
        error = (buffer.to(zeta) - zeta).abs().max().item()
        # Half types hold the same constants, rounded.
        rounding = torch.finfo(buffer.dtype).eps if buffer.is_floating_point() else 0.0
        if error > max(_ZETA_TOLERANCE, rounding):
            raise ValueError(
                f"{key} must hold xPos's constants (2c / head_dim + 0.4) / 1.4, got values off by "
                f"up to {error:.3g}: {buffer.tolist()}."
            )


def _check_tied_head(state_dict: Mapping[str, Tensor], config: TextConfig) -> None:
    if not config.has_tied_head or not {_HEAD, _EMBEDDING} <= state_dict.keys():
        return
    if not torch.equal(state_dict[_HEAD], state_dict[_EMBEDDING]):
        raise ValueError(
            f"tie_embeddings=True needs {_HEAD} equal to {_EMBEDDING}, but they differ. "
            "Pass tie_embeddings=False."
        )


def _check_torchscale_has(config: TextConfig) -> None:
    """Refuses options with which torchscale would compute something else."""
    wanted: dict[str, tuple[object, ...]] = {
        "position": (None, "xpos", "relative"),
        "extra_branches": ((),),
    }
    if config.position == "xpos":
        wanted["rotary_base"] = (10000.0,)
    if max(config.dilation_rates) > 1:
        wanted["head_offset"] = ("block",)
    if not config.is_causal and config.segment_lengths[0] < DENSE_SEGMENT:
        wanted["padded_keys"] = ("zero",)
    refuse_unpublished(config, wanted, code="torchscale")
