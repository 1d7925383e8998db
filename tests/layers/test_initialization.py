"""Initial values right after construction: every named weight, and the published gains."""

import math

import pytest
import torch
from torch import nn

from longnet_zoo.layers import (
    RelativeBias,
    TransformerStack,
    initialize_weights,
    residual_gain,
    residual_scale,
)
from longnet_zoo.ops.pattern import DilatedPattern

PATTERN = DilatedPattern(segment_lengths=(5, 11), dilation_rates=(1, 3))
EMBED_DIM, FFN_DIM, NUM_LAYERS = 96, 320, 3
GAINS = {
    "sub_ln": math.sqrt(math.log(2 * NUM_LAYERS)),
    "deepnorm": (8 * NUM_LAYERS) ** -0.25,
    "pre_ln": 1.0,
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("norm", GAINS)
def test_std_of_every_weight_after_construction(norm, is_causal):
    stack = TransformerStack(
        embed_dim=EMBED_DIM,
        num_layers=NUM_LAYERS,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=FFN_DIM,
        pattern=PATTERN,
        is_causal=is_causal,
        position="relative",
        relative_buckets=256,
        relative_max_distance=4096,
        norm=norm,
        activation="swiglu",
        qk_norm=True,
    )
    kv_dim, gain = EMBED_DIM // 2, GAINS[norm]
    shapes_and_gains = {
        "q_proj": (EMBED_DIM, EMBED_DIM, 1.0),
        "k_proj": (kv_dim, EMBED_DIM, 1.0),
        "v_proj": (kv_dim, EMBED_DIM, gain),
        "out_proj": (EMBED_DIM, EMBED_DIM, gain),
        "fc1": (FFN_DIM, EMBED_DIM, gain),
        "gate": (FFN_DIM, EMBED_DIM, gain),
        "fc2": (EMBED_DIM, FFN_DIM, gain),
    }
    num_checked = 0
    for name, parameter in stack.named_parameters():
        role, kind = name.split(".")[-2:]
        if kind == "bias":
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "norm" in role:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif role == "embedding":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            num_checked += 1
        else:
            fan_out, fan_in, expected_gain = shapes_and_gains[role]
            assert parameter.shape == (fan_out, fan_in)
            std = expected_gain * math.sqrt(2 / (fan_in + fan_out))
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert parameter.mean().abs() < 0.1 * std
            num_checked += 1
    assert num_checked == 7 * NUM_LAYERS + 1


def test_embeddings_have_unit_norm_on_average():
    module = nn.ModuleDict({"tokens": nn.Embedding(500, 64), "bias": RelativeBias(num_heads=64)})
    initialize_weights(module, gain=1.0)
    assert module["tokens"].weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert module["bias"].embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


# Magneto, Table 2, and DeepNet, Table 1, with N = 5 encoder and M = 7 decoder layers.
@pytest.mark.parametrize(
    ("norm", "part", "num_encoder", "num_decoder", "gain", "scale"),
    [
        ("sub_ln", "encoder", 5, 0, math.sqrt(math.log(10)), 1.0),
        ("sub_ln", "decoder", 0, 7, math.sqrt(math.log(14)), 1.0),
        ("sub_ln", "encoder", 5, 7, math.sqrt(math.log(21) * math.log(10) / 3), 1.0),
        ("sub_ln", "decoder", 5, 7, math.sqrt(math.log(21)), 1.0),
        ("deepnorm", "encoder", 5, 0, 40**-0.25, 10**0.25),
        ("deepnorm", "decoder", 0, 7, 56**-0.25, 14**0.25),
        ("deepnorm", "encoder", 5, 7, 0.87 * 4375 ** (-1 / 16), 0.81 * 4375 ** (1 / 16)),
        ("deepnorm", "decoder", 5, 7, 84**-0.25, 21**0.25),
        ("pre_ln", "encoder", 5, 0, 1.0, 1.0),
    ],
)
def test_published_gains_and_scales(norm, part, num_encoder, num_decoder, gain, scale):
    layers = {"num_encoder_layers": num_encoder, "num_decoder_layers": num_decoder}
    assert residual_gain(norm, part=part, **layers) == pytest.approx(gain, rel=1e-12)
    assert residual_scale(norm, part=part, **layers) == pytest.approx(scale, rel=1e-12)


def test_a_part_needs_layers():
    for function in (residual_gain, residual_scale):
        with pytest.raises(ValueError, match="part='decoder' needs num_decoder_layers"):
            function("sub_ln", part="decoder", num_encoder_layers=3)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match=r"'q_proj', 'k_proj', .* got 'adapter'"):
        initialize_weights(nn.ModuleDict({"adapter": nn.Linear(2, 3)}), gain=1.0)
    with pytest.raises(ValueError, match="got Conv1d at 'fc1'"):
        initialize_weights(nn.ModuleDict({"fc1": nn.Conv1d(2, 3, 1)}), gain=1.0)
