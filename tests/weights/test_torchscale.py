"""Published models must come out as they were; tests/fixtures holds torchscale's own outputs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longnet_zoo.models import LongNetLM, LongNetLMConfig, LongNetMLM, LongNetMLMConfig
from longnet_zoo.weights import (
    config_from_torchscale,
    convert_torchscale_state_dict,
    load_state_dict,
    model_from_torchscale,
    to_torchscale_state_dict,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
DECODERS = ["longnet_decoder", "longnet_decoder_xpos"]
ENCODERS = ["longnet_encoder", "longnet_encoder_xpos_postnorm", "encoder_relative_bias"]


def read(name):
    """Config, published weights and the other tensors of a fixture."""
    with safe_open(FIXTURES / f"torchscale_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")}
    return config, weights, {k: x for k, x in tensors.items() if not k.startswith("model.")}


def assert_close(ours, published):
    torch.testing.assert_close(ours, published, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_published_decoder_is_reproduced(name):
    config, weights, tensors = read(name)
    model = model_from_torchscale(weights, config).eval()
    assert isinstance(model, LongNetLM)
    assert_close(model(tensors["tokens"]), tensors["logits"])


@pytest.mark.parametrize("name", ENCODERS)
def test_published_encoder_is_reproduced(name):
    config, weights, tensors = read(name)
    model = model_from_torchscale(weights, config).eval()
    assert isinstance(model, LongNetMLM)
    padding = tensors.get("padding_mask", torch.zeros(tensors["input"].shape[:2])).bool()
    mask = padding if padding.any() else None
    out = model(inputs_embeds=tensors["input"], key_padding_mask=mask)
    assert_close(out[~padding], tensors["encoder_out"][~padding])
    assert padding.any() == (name == "encoder_relative_bias")


@pytest.mark.parametrize("name", ENCODERS[:2])
def test_states_of_a_published_encoder_are_reproduced(name):
    config, weights, tensors = read(name)
    model = model_from_torchscale(weights, config).eval()
    _, states = model.stack(tensors["input"], return_hidden_states=True)
    assert len(states) == 3
    for place, state in enumerate(states):
        assert_close(state, tensors[f"encoder_states.{place}"])


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_round_trip_gives_every_published_key_back(name):
    config, weights, _ = read(name)
    back = to_torchscale_state_dict(model_from_torchscale(weights, config))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "pre_ln"},
        {"norm": "deepnorm", "position": None},
        {"tie_embeddings": False},
        {"tie_embeddings": False, "num_outputs": 0},
        {"tie_embeddings": False, "num_outputs": 5},
        {"vocab_size": None},
        {"position": "relative", "relative_buckets": 8, "relative_max_distance": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", [(LongNetLM, LongNetLMConfig), (LongNetMLM, LongNetMLMConfig)])
def test_round_trip_of_our_models(family, options):
    make, make_config = family
    config = make_config(
        **{
            "vocab_size": 61,
            "embed_dim": 24,
            "num_layers": 2,
            "num_heads": 4,
            "segment_lengths": (7, 16),
            "dilation_rates": (1, 3),
            "head_offset": "block",
            "padded_keys": "zero",
            "position": "xpos",
            **options,
        }
    )
    model, other = make(config), make(config)
    load_state_dict(other, convert_torchscale_state_dict(to_torchscale_state_dict(model), config))
    x = torch.randn(2, 20, 24)
    assert torch.equal(model(inputs_embeds=x), other(inputs_embeds=x))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_decoder_keeps_the_buckets_it_uses():
    # torchscale's decoders have buckets for later keys as well, which never come up.
    config = {
        "decoder_embed_dim": 24,
        "decoder_attention_heads": 4,
        "decoder_layers": 1,
        "rel_pos_buckets": 16,
        "max_rel_pos": 32,
        "vocab_size": 61,
    }
    ours = config_from_torchscale(config)
    weights = to_torchscale_state_dict(LongNetLM(ours))
    key = "self_attn_relative_position.relative_attention_bias.weight"
    assert weights[key].shape == (16, 4)
    weights[key][8:] = 5.0
    model = model_from_torchscale(weights, config)
    assert model.stack.position_bias.embedding.weight.shape == (8, 4)
    assert torch.equal(model.stack.position_bias.embedding.weight, weights[key][:8])


def test_tied_head_is_dropped_and_made_again():
    config, weights, tensors = read("longnet_decoder")
    config["share_decoder_input_output_embed"] = True
    with pytest.raises(ValueError, match=r"output_projection.weight equal to embed_tokens.weight"):
        model_from_torchscale(weights, config)
    weights["output_projection.weight"] = weights["embed_tokens.weight"].clone()
    model = model_from_torchscale(weights, config)
    assert model.head is None
    logits = model.forward_features(tensors["tokens"]) @ weights["embed_tokens.weight"].T
    assert_close(model(tensors["tokens"]), logits)
    assert to_torchscale_state_dict(model).keys() == weights.keys()


def test_keys_that_are_left_over_or_missing_are_all_listed():
    config, weights, _ = read("longnet_decoder_xpos")
    del weights["layers.1.ffn.fc1.bias"], weights["layer_norm.weight"]
    with pytest.raises(ValueError, match=r"2 missing \(stack.blocks.1.feed_forward.fc1.bias, sta"):
        model_from_torchscale(weights, config)
    weights |= {"embed_positions.weight": torch.zeros(5, 32), "version": torch.ones(1)}
    with pytest.raises(ValueError, match=r"LongNetLMConfig: embed_positions\.weight, version"):
        model_from_torchscale(weights, config)
    # Constants of xPos in a model without xPos would be lost.
    config, weights, _ = read("longnet_decoder_xpos")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.xpos.scale, .*position=None"):
        model_from_torchscale(weights, {**config, "xpos_rel_pos": False})
    with pytest.raises(ValueError, match=r"output_projection.weight.*num_outputs=0"):
        model_from_torchscale(weights, {**config, "no_output_layer": True})


@pytest.mark.parametrize("position", ["xpos", "rotary", "alibi"])
def test_positions_that_no_key_would_miss_are_refused(position):
    config, weights, _ = read("longnet_decoder")
    ours = replace(config_from_torchscale(config), position=position)
    with pytest.raises(ValueError, match=f"without xPos constants .*got position='{position}'"):
        convert_torchscale_state_dict(weights, ours)


def test_other_constants_of_xpos_are_refused():
    config, weights, _ = read("longnet_decoder_xpos")
    key = "layers.1.self_attn.xpos.scale"
    with pytest.raises(ValueError, match=rf"{key} must hold xPos's constants .*off by up to 0\.\d"):
        convert_torchscale_state_dict(
            {**weights, key: weights[key].int()}, config_from_torchscale(config)
        )
    with pytest.raises(ValueError, match=rf"{key} must hold xPos's constants .*off by up to 0.01"):
        model_from_torchscale({**weights, key: weights[key] + 0.01}, config)
    with pytest.raises(ValueError, match=rf"{key} must hold one number .*\(4,\) .*got \(8,\)"):
        model_from_torchscale({**weights, key: torch.ones(8)}, config)
    half = {name: x.to(torch.bfloat16) for name, x in weights.items()}
    assert model_from_torchscale(half, config).config.position == "xpos"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swiglu"}, "activation='swiglu'"),
        ({"position": "rotary"}, "position='rotary'"),
        ({"position": "alibi"}, "position='alibi'"),
        ({"position": "xpos", "rotary_base": 500.0}, "rotary_base=500.0"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"bias": False}, "bias=False"),
        ({"head_offset": "modulo"}, "head_offset='modulo'; it computes head_offset='block'"),
        ({"padded_keys": "ignore"}, "padded_keys='ignore'; it computes padded_keys='zero'"),
    ],
)
def test_models_that_torchscale_cannot_run_are_refused(options, message):
    config = LongNetMLMConfig(
        **{
            "vocab_size": 61,
            "embed_dim": 24,
            "num_layers": 1,
            "num_heads": 4,
            "segment_lengths": (7, 16),
            "dilation_rates": (1, 3),
            "head_offset": "block",
            "padded_keys": "zero",
            "position": None,
            **options,
        }
    )
    with pytest.raises(NotImplementedError, match=message):
        to_torchscale_state_dict(LongNetMLM(config))
