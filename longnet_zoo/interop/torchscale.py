"""Live modules of microsoft/torchscale as models of this package, and weights for the way back.

| torchscale | this package |
|---|---|
| `Encoder`, `LongNetEncoder` | `LongNetMLM` |
| `Decoder`, `LongNetDecoder` | `LongNetLM` |
| `BEiT3` | `BEiT3` |

torchscale itself is never imported: a module is known by the names of its classes, so copies of
torchscale inside other projects serve as well.

Outputs are the same in float32, but for what torchscale gets wrong. Here

- a LongNet obeys a padding mask, which torchscale drops: a padded batch equals its sequences one by
  one; for the other modules only the outputs of padding differ, and those mean nothing;
- xPos of a LongNet stays finite at any length, while torchscale's overflows beyond about 72,000
  tokens (where ours would, in dense attention, it raises), and its angles are exact in half types;
- gradients of a LongNet go through the mixture weights of its branches, and its attention dropout
  rests in evaluation mode.

Facts from torchscale's `architecture/`, `component/` and `model/`, release 0.3.0 (which has no
LongNet) and commit 4d1e0e8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.layers import TransformerBlock
from longnet_zoo.models import (
    BEiT3,
    BEiT3Config,
    LongNetLM,
    LongNetLMConfig,
    LongNetMLM,
    LongNetMLMConfig,
    ZooModel,
)
from longnet_zoo.weights.beit3 import beit3_names, dense_segments
from longnet_zoo.weights.keys import published_names, refuse_unpublished, rename
from longnet_zoo.weights.load import load_state_dict
from longnet_zoo.weights.torchscale import convert_torchscale_state_dict
from longnet_zoo.weights.torchscale import to_torchscale_state_dict as text_to_torchscale
from longnet_zoo.weights.torchscale_config import (
    beit3_config_from_torchscale,
    config_from_torchscale,
)

__all__ = ["from_torchscale", "to_torchscale_state_dict"]

# Classes that are converted, and how the names of their options begin.
_PARTS = {"Encoder": "encoder", "Decoder": "decoder", "BEiT3": "encoder"}
_LONGNET_ATTENTION, _DENSE_ATTENTION = "DilatedAttention", "MultiheadAttention"
# Where a rate of dropout takes effect; the longest ending of a name counts.
_DROPOUT_OPTIONS = {
    "self_attn.dropout_module": "attention_dropout",
    "activation_dropout_module": "activation_dropout",
    "dropout_module": "dropout",
}


def from_torchscale(module: nn.Module) -> LongNetLM | LongNetMLM | BEiT3:
    """Makes our model of a live module of torchscale, with the same outputs.

    The options are read from `module.args` and checked against the module. Embedding and output
    projection are taken as they are, whatever the options say; a module without output projection
    gives a model that returns features. A plain encoder or decoder gets dense attention, a LongNet
    its segments, with `head_offset="block"` and `padded_keys="zero"`. Tokens and padding masks go
    in as for any model of ours: `model(tokens, key_padding_mask=mask)`, or
    `model(inputs_embeds=x)` for torchscale's `token_embeddings`.

    Args:
        module: An Encoder, Decoder, LongNetEncoder, LongNetDecoder or BEiT3.

    Returns:
        A `LongNetMLM`, `LongNetLM` or `BEiT3` with weights of its own, all of them trainable, in
        the data type, on the device and in the mode (training or evaluation) of the module.

    Raises:
        TypeError: If it is none of these modules.
        ValueError: If the module is not what its `args` say, they have an unknown option, or its
            parameters have several types or devices.
        NotImplementedError: If an option asks for what our models do not have.

    Example:
        >>> model = from_torchscale(Decoder(DecoderConfig(vocab_size=64), nn.Embedding(64, 768)))
        >>> logits = model(tokens)
    """
    kind = _kind(module)
    if kind is None:
        raise TypeError(_unknown_module(module))
    options = _read_args(module, _PARTS[kind])
    if kind == "BEiT3":
        model: Any = BEiT3(_beit3_config(module, options))
        body: Any = module.encoder
    else:
        config = _text_config(module, options)
        model = LongNetLM(config) if kind == "Decoder" else LongNetMLM(config)
        body = module
    _check_layers(body, model)
    _load(model, module)
    model.set_grad_checkpointing(bool(options.get("checkpoint_activations")))
    return model.train(module.training)


def to_torchscale_state_dict(model: LongNetLM | LongNetMLM | BEiT3) -> dict[str, Tensor]:
    """Renames the weights of a model for a module of torchscale; the way back.

    The names are those of a Decoder for a `LongNetLM`, of an Encoder for a `LongNetMLM` and of a
    BEiT3 for a `BEiT3`. Make the module with the sizes of `model.config`: a plain Encoder or
    Decoder for the dense pattern, else a LongNet one; `rel_pos_buckets` of a Decoder is twice our
    `relative_buckets` (its second half is for later keys, which it never sees), and
    `max_source_positions` of a BEiT3 is `max_text_len + 2`.

    Args:
        model: A model with options that torchscale has as well.

    Returns:
        Weights and buffers for `module.load_state_dict(..., strict=True)`, sharing memory with the
        model.

    Raises:
        TypeError: If it is no model of this package.
        NotImplementedError: If torchscale has no such module, or would compute something else.

    Example:
        >>> decoder.load_state_dict(to_torchscale_state_dict(model), strict=True)
    """
    if isinstance(model, BEiT3):
        _check_beit3_of_torchscale(model)
        return published_names(model, beit3_names(model.config))
    if isinstance(model, LongNetLM | LongNetMLM):
        _check_bias_of_torchscale(model)
        return text_to_torchscale(model)
    if isinstance(model, ZooModel):
        raise NotImplementedError(
            "torchscale has modules like LongNetLM, LongNetMLM and BEiT3, got a "
            f"{type(model).__name__}. longnet_zoo.weights.to_published_state_dict may have names."
        )
    raise TypeError(
        f"model must be a LongNetLM, LongNetMLM or BEiT3, got {type(model).__name__}. "
        "from_torchscale makes one of a module of torchscale."
    )


def _kind(module: object) -> str | None:
    """The class of torchscale that a module is made of; None if it is another one."""
    names = _torchscale_classes(module)
    return next((name for name in names if name in _PARTS), None)


def _torchscale_classes(module: object) -> list[str]:
    return [
        parent.__name__
        for parent in type(module).__mro__
        if "torchscale" in parent.__module__.split(".")
    ]


def _unknown_module(module: object) -> str:
    allowed = "module must be torchscale's Encoder, Decoder, LongNet or BEiT3 itself"
    if not isinstance(module, nn.Module):
        return f"{allowed}, a live module, got {module!r}."
    got = f"{allowed}, got a {type(module).__name__} of {type(module).__module__}"
    inside = next((name for name, part in module.named_modules() if _kind(part)), None)
    return f"{got}." if inside is None else f"{got}. Pass its part {inside!r}."


def _read_args(module: Any, part: str) -> dict[str, Any]:
    """The options of a module without those of the other part of an encoder-decoder."""
    args = getattr(module, "args", None)
    options = dict(args) if isinstance(args, Mapping) else dict(getattr(args, "__dict__", {}))
    if not options:
        raise ValueError(
            f"module.args must hold the options that torchscale made it with, got {args!r}."
        )
    other = "decoder_" if part == "encoder" else "encoder_"
    return {name: value for name, value in options.items() if other not in name}


def _text_config(module: Any, options: Mapping[str, Any]) -> LongNetLMConfig | LongNetMLMConfig:
    positions = getattr(module, "embed_positions", None)
    if positions is not None:
        raise NotImplementedError(
            f"embed_positions={type(positions).__name__} has no counterpart here; xPos and the "
            "relative bias have. Set module.embed_positions = None, add the positions to the "
            "embeddings yourself and pass them as inputs_embeds."
        )
    if _attention(module) == _DENSE_ATTENTION:
        options = {**options, "segment_length": None, "dilated_ratio": None}
    elif not options.get("segment_length"):
        raise ValueError(
            "a LongNet needs segment_length and dilated_ratio in module.args, got "
            f"segment_length={options.get('segment_length')!r}."
        )
    # The module shows better than its options what comes before and after the layers.
    return replace(config_from_torchscale(options), **_embedding_and_head(module))


def _beit3_config(module: Any, options: Mapping[str, Any]) -> BEiT3Config:
    if module.encoder.output_projection is not None:
        raise NotImplementedError(
            "a BEiT3 must have no output_projection, got "
            f"{module.encoder.output_projection!r} (no_output_layer=False). Set "
            "module.encoder.output_projection = None to convert what makes its features."
        )
    if _attention(module.encoder) != _DENSE_ATTENTION:
        raise NotImplementedError(
            f"a BEiT3 must have torchscale's {_DENSE_ATTENTION}, got {_LONGNET_ATTENTION}."
        )
    return beit3_config_from_torchscale({**options, "no_output_layer": True})


def _attention(module: Any) -> str:
    """The class of the attention of all layers."""
    known = {_LONGNET_ATTENTION, _DENSE_ATTENTION}
    found = set()
    for layer in module.layers:
        names = _torchscale_classes(layer.self_attn)
        found.add(next((x for x in names if x in known), type(layer.self_attn).__name__))
    if len(found) != 1 or found - known:
        raise NotImplementedError(
            f"all layers must have torchscale's {_DENSE_ATTENTION}, or all {_LONGNET_ATTENTION}, "
            f"got {', '.join(sorted(found)) or 'no layers'}."
        )
    return found.pop()


def _embedding_and_head(module: Any) -> dict[str, Any]:
    embedding, head = module.embed_tokens, module.output_projection
    is_plain = isinstance(embedding, nn.Embedding) and embedding.max_norm is None
    if embedding is not None and not is_plain:
        raise NotImplementedError(
            f"embed_tokens must be an nn.Embedding without max_norm, or None, got {embedding!r}."
        )
    if head is not None and not (isinstance(head, nn.Linear) and head.bias is None):
        raise NotImplementedError(
            f"output_projection must be an nn.Linear without bias, or None, got {head!r}. Set it "
            "to None, convert, and apply it to the features yourself."
        )
    vocab_size = None if embedding is None else embedding.num_embeddings
    num_outputs = 0 if head is None else head.out_features
    is_tied = embedding is not None and head is not None and head.weight is embedding.weight
    return {
        "vocab_size": vocab_size,
        "num_outputs": None if num_outputs == (vocab_size or 0) else num_outputs,
        "tie_embeddings": is_tied,
    }


def _check_layers(body: Any, model: Any) -> None:
    """Checks what neither the options nor the names of weights show."""
    _check_numbers(body, model.config)
    for number, (layer, block) in enumerate(zip(body.layers, model.stack.blocks, strict=False)):
        _check_layer(number, layer, block)
    for name, part in body.named_modules():
        option = next((x for end, x in _DROPOUT_OPTIONS.items() if name.endswith(end)), None)
        if option is not None and part.p != getattr(model.config, option):
            raise ValueError(
                f"{name}.p must be args.{option}={getattr(model.config, option)}, as torchscale "
                f"made it, got {part.p}. Set both alike."
            )


def _check_numbers(body: Any, config: Any) -> None:
    """Checks that a module was built with its options: they may have been changed afterwards."""
    is_scaled = getattr(config, "scale_embedding", False)
    wanted = {
        "num_heads": config.num_heads,
        "scaling": config.head_dim**-0.5,
        "eps": config.eps,
        "activation_fn": functional.gelu,
        "embed_scale": config.embed_dim**0.5 if is_scaled else 1.0,
        "scale_base": getattr(config, "xpos_scale_base", None),
        "max_distance": getattr(config, "relative_max_distance", None),
    }
    for name, part in body.named_modules():
        for attribute, value in wanted.items():
            found = getattr(part, attribute, value)
            if found != value:
                where = f"{name}.{attribute}" if name else attribute
                raise ValueError(
                    f"the module must be what its args say, by which {where} is {value}, got "
                    f"{found}. Were args changed after it was built?"
                )


def _check_layer(number: int, layer: Any, block: TransformerBlock) -> None:
    if getattr(layer, "encoder_attn", None) is not None:
        raise NotImplementedError(
            f"cross-attention has no counterpart here, got encoder_attn in layers.{number}. The "
            "encoder of an encoder-decoder can be converted alone."
        )
    is_pre_norm, scale = block.norm != "deepnorm", block.residual_scale
    if layer.normalize_before != is_pre_norm or abs(layer.alpha - scale) > 1e-6:
        raise NotImplementedError(
            f"norm={block.norm!r} must go with normalize_before={is_pre_norm} and "
            f"alpha={scale:.6g}, got normalize_before={layer.normalize_before} and "
            f"alpha={layer.alpha:.6g} in layers.{number}. The encoder of an encoder-decoder with "
            "deepnorm has another alpha."
        )


def _load(model: Any, module: nn.Module) -> None:
    """Gives the model the weights of the module, and their type and device."""
    kinds = {(x.device, x.dtype) for x in module.parameters()}
    if len(kinds) != 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise ValueError(
            f"all parameters of the module must have one data type and device, got {found}. Call "
            "module.to(device, dtype) first."
        )
    ((device, dtype),) = kinds
    source, weights = f"the module {type(module).__name__}", module.state_dict()
    if isinstance(model, BEiT3):
        weights = rename(weights, beit3_names(model.config), family="torchscale's BEiT3")
    else:
        weights = convert_torchscale_state_dict(weights, model.config)
    load_state_dict(model.to(device=device, dtype=dtype), weights, source=source)


def _check_beit3_of_torchscale(model: BEiT3) -> None:
    """Refuses what torchscale's BEiT3 does not have."""
    vocab_size = model.config.vocab_size
    wanted: dict[str, tuple[object, ...]] = {
        "segment_lengths": dense_segments(model.config),
        "vocab_size": ("a number of tokens",) if vocab_size is None else (vocab_size,),
        "heads": ((),),
        "num_classes": (0,),
    }
    refuse_unpublished(model.config, wanted, code="torchscale's BEiT3")


def _check_bias_of_torchscale(model: LongNetLM | LongNetMLM) -> None:
    config = model.config
    if config.position == "relative" and not config.pattern.is_dense:
        raise NotImplementedError(
            "torchscale's LongNet takes no relative bias, got position='relative' with "
            f"segment_lengths={config.segment_lengths}."
        )
