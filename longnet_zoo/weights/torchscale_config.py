"""Options of microsoft/torchscale (EncoderConfig, DecoderConfig) as our configs, BEiT3's too."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from typing import Any, Literal

from longnet_zoo.models import BEiT3Config, LongNetLMConfig, LongNetMLMConfig
from longnet_zoo.models.beit3_inputs import FIRST_ROW
from longnet_zoo.ops.pattern import DENSE_SEGMENT

__all__ = ["beit3_config_from_torchscale", "config_from_torchscale"]

Part = Literal["encoder", "decoder"]

# Defaults of torchscale's `architecture/config.py`; {} is "encoder" or "decoder".
_DEFAULTS: dict[str, Any] = {
    "{}_embed_dim": 768,
    "{}_attention_heads": 12,
    "{}_ffn_embed_dim": 3072,
    "{}_layers": 12,
    "{}_normalize_before": True,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "drop_path_rate": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "no_scale_embedding": True,
    "rel_pos_buckets": 0,
    "max_rel_pos": 0,
    "deepnorm": False,
    "subln": True,
    "share_{}_input_output_embed": False,
    "no_output_layer": False,
    "layernorm_eps": 1e-5,
    "vocab_size": -1,
    "xpos_rel_pos": False,
    "xpos_scale_base": 512,
    "segment_length": None,
    "dilated_ratio": None,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "multiway": False,
    "normalize_output": True,
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "max_source_positions": 1024,
}
# Options with one value that our models have.
_TEXT_VALUES = {
    "layernorm_embedding": False,
    "moe_freq": 0,
    "multiway": False,
    "normalize_output": True,
}
_BEIT3_VALUES = {
    "layernorm_embedding": False,
    "moe_freq": 0,
    "multiway": True,
    "no_output_layer": True,
    "no_scale_embedding": True,
    "rel_pos_buckets": 0,
    "share_encoder_input_output_embed": False,
    "xpos_rel_pos": False,
}
# No influence on the outputs of a trained model without experts.
_IGNORED = {
    "bert_init",
    "checkpoint_activations",
    "ddp_rank",
    "encoder_embedding_type",
    "flash_attention",
    "fsdp",
    "max_target_positions",
    "moe_eval_capacity_token_fraction",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_normalize_gate_prob_before_dropping",
    "moe_second_expert_policy",
    "moe_top1_expert",
    "seq_parallel",
    "share_all_embeddings",
    "use_xmoe",
}


def config_from_torchscale(config: Mapping[str, object]) -> LongNetLMConfig | LongNetMLMConfig:
    """Translates torchscale's options; missing ones take torchscale's defaults.

    `decoder_*` options give a causal model, `encoder_*` options a bidirectional one. Without
    `segment_length` attention is dense, as in torchscale's plain Encoder and Decoder. Segment
    lengths and ratios may be strings such as "[2048, 4096]", as torchscale takes them; they are
    parsed as literals, never evaluated.

    Args:
        config: torchscale's options by name.

    Returns:
        Our config, with the switches that torchscale's weights were trained with.

    Raises:
        ValueError: If an option is unknown, or is not what torchscale accepts.
        NotImplementedError: If an option asks for what our models do not have.
    """
    part = _find_part(config)
    options = _with_defaults(config, part, allowed=_TEXT_VALUES)
    is_causal = part == "decoder"
    common = {
        **_stack_options(options, part),
        "vocab_size": options["vocab_size"] if options["vocab_size"] > 0 else None,
        "num_outputs": 0 if options["no_output_layer"] else None,
        "tie_embeddings": options[f"share_{part}_input_output_embed"],
        "scale_embedding": not options["no_scale_embedding"],
        **_pattern(options),
        **_position(options, is_causal=is_causal),
    }
    return LongNetLMConfig(**common) if is_causal else LongNetMLMConfig(**common)


def beit3_config_from_torchscale(config: Mapping[str, object]) -> BEiT3Config:
    """Translates the options of torchscale's BEiT3, whose attention is dense whatever they say.

    Args:
        config: torchscale's options by name; missing ones take torchscale's defaults.

    Returns:
        The config of our BEiT-3, without heads.

    Raises:
        ValueError: If an option is unknown, or is not what torchscale accepts.
        NotImplementedError: If an option asks for what our BEiT-3 does not have.
    """
    options = _with_defaults(config, "encoder", allowed=_BEIT3_VALUES)
    return BEiT3Config(
        **_stack_options(options, "encoder"),
        img_size=options["img_size"],
        patch_size=options["patch_size"],
        in_chans=options["in_chans"],
        vocab_size=options["vocab_size"],
        max_text_len=options["max_source_positions"] - FIRST_ROW,
        final_norm=options["normalize_output"],
    )


def _stack_options(options: Mapping[str, Any], part: Part) -> dict[str, Any]:
    return {
        "embed_dim": options[f"{part}_embed_dim"],
        "num_layers": options[f"{part}_layers"],
        "num_heads": options[f"{part}_attention_heads"],
        "ffn_dim": options[f"{part}_ffn_embed_dim"],
        "norm": _norm(options, part),
        "activation": _activation(options["activation_fn"]),
        "dropout": options["dropout"],
        "attention_dropout": options["attention_dropout"],
        "activation_dropout": options["activation_dropout"],
        "drop_path": options["drop_path_rate"],
        "eps": options["layernorm_eps"],
    }


def _find_part(config: Mapping[str, object]) -> Part:
    found = {part for part in ("encoder", "decoder") if any(f"{part}_" in key for key in config)}
    if found == {"encoder"}:
        return "encoder"
    if found == {"decoder"}:
        return "decoder"
    if found:
        raise NotImplementedError(
            "an encoder-decoder has no counterpart here, got options of both: "
            f"{', '.join(sorted(config))}. Convert the two parts one by one."
        )
    raise ValueError(
        "the config must have options named encoder_* or decoder_*, such as decoder_layers, got "
        f"{', '.join(sorted(config)) or 'no options'}."
    )


def _with_defaults(
    config: Mapping[str, object], part: Part, *, allowed: Mapping[str, object]
) -> dict[str, Any]:
    defaults = {name.format(part): value for name, value in _DEFAULTS.items()}
    known = defaults.keys() | _IGNORED
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            cure = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"torchscale has no option {name!r} for {part}s.{cure}")
    options = defaults | {name: value for name, value in config.items() if name in defaults}
    for name, value in allowed.items():
        if options[name] != value:
            raise NotImplementedError(
                f"torchscale's {name}={options[name]!r} has no counterpart here; only {value!r} "
                "has. Only what was built with that can be converted."
            )
    return options


def _norm(options: Mapping[str, Any], part: Part) -> str:
    is_pre_norm = options[f"{part}_normalize_before"]
    if part == "encoder":
        # EncoderConfig derives this from the other two; DecoderConfig leaves its own as given.
        is_pre_norm = not options["deepnorm"] and (options["subln"] or is_pre_norm)
    if options["deepnorm"] and not is_pre_norm:
        return "deepnorm"
    if not options["deepnorm"] and is_pre_norm:
        return "sub_ln" if options["subln"] else "pre_ln"
    raise NotImplementedError(
        "torchscale's norms have a counterpart as sub-LN, pre-LN or DeepNorm, got "
        f"deepnorm={options['deepnorm']}, subln={options['subln']} and "
        f"{part}_normalize_before={is_pre_norm}."
    )


def _activation(name: str) -> str:
    if name != "gelu":
        raise NotImplementedError(
            f"torchscale's activation_fn={name!r} has no counterpart here; 'gelu' has."
        )
    return name


def _pattern(options: Mapping[str, Any]) -> dict[str, Any]:
    lengths = _parse_integers("segment_length", options["segment_length"])
    rates = _parse_integers("dilated_ratio", options["dilated_ratio"])
    if (lengths is None) != (rates is None):
        raise ValueError(
            "segment_length and dilated_ratio come together, got "
            f"segment_length={options['segment_length']!r} and "
            f"dilated_ratio={options['dilated_ratio']!r}."
        )
    if lengths is None:
        return {"segment_lengths": (DENSE_SEGMENT,), "dilation_rates": (1,)}
    return {
        "segment_lengths": lengths,
        "dilation_rates": rates,
        "head_offset": "block",
        "padded_keys": "zero",
    }


def _parse_integers(name: str, value: object) -> tuple[int, ...] | None:
    if value is None or value == "":
        return None
    try:
        parsed = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple(int(number) for number in parsed)  # type: ignore[union-attr]
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"{name} must be a list of integers or a string such as '[8, 16]', got {value!r}."
        ) from error


def _position(options: Mapping[str, Any], *, is_causal: bool) -> dict[str, Any]:
    has_table = options["rel_pos_buckets"] > 0 and options["max_rel_pos"] > 0
    if options["xpos_rel_pos"] and has_table:
        raise NotImplementedError(
            "xPos together with a relative bias has no counterpart here, got xpos_rel_pos=True "
            f"and rel_pos_buckets={options['rel_pos_buckets']}."
        )
    if options["xpos_rel_pos"]:
        return {"position": "xpos", "xpos_scale_base": float(options["xpos_scale_base"])}
    if has_table:
        if options["rel_pos_buckets"] % 2:
            raise ValueError(
                "rel_pos_buckets must be even, half of them for later keys, got "
                f"{options['rel_pos_buckets']}."
            )
        # A decoder never uses the half of its buckets that is for later keys.
        buckets = options["rel_pos_buckets"] // (2 if is_causal else 1)
        return {
            "position": "relative",
            "relative_buckets": buckets,
            "relative_max_distance": options["max_rel_pos"],
        }
    return {"position": None}
