"""The published slide encoder must come out as it was; tests/fixtures holds its own outputs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longnet_zoo.factory import create_model
from longnet_zoo.models import GigaPathSlideConfig, GigaPathSlideEncoder
from longnet_zoo.models.slide_positions import sincos_positions
from longnet_zoo.weights.gigapath import CONVERTER
from longnet_zoo.weights.load import load_state_dict

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gigapath_slide_encoder.safetensors"


def read():
    """Our config, published weights and the other tensors of the fixture."""
    with safe_open(FIXTURE, "pt") as file:
        published = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = GigaPathSlideConfig(
        input_dim=published["in_chans"],
        embed_dim=published["embed_dim"],
        num_layers=published["depth"],
        num_heads=published["num_heads"],
        ffn_dim=published["mlp_ratio"] * published["embed_dim"],
        grid_size=published["slide_ngrids"],
        tile_size=published["tile_size"],
        segment_lengths=published["segment_lengths"],
        dilation_rates=published["dilation_rates"],
        norm_eps=published["norm_eps"],
        eps=published["encoder_norm_eps"],
        **CONVERTER.options,
    )
    weights = {k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")}
    return config, weights, {k: x for k, x in tensors.items() if not k.startswith("model.")}


def load(config, weights):
    model = GigaPathSlideEncoder(config).eval()
    load_state_dict(model, CONVERTER.from_published(weights, config))
    return model


def assert_close(ours, published):
    torch.testing.assert_close(ours, published, atol=1e-5, rtol=0)


# The fixture's coordinates are random, so several of its tiles share a cell.
@pytest.mark.parametrize(("pool", "key"), [("cls", "cls"), ("mean", "global_pool")])
def test_published_embeddings_are_reproduced(pool, key):
    config, weights, tensors = read()
    model = load(dataclasses.replace(config, pool=pool), weights)
    slide = tensors["tiles"], tensors["coords"]
    assert_close(model(*slide, check_coords=False), tensors[key])


def test_published_layers_are_reproduced():
    config, weights, tensors = read()
    model = load(config, weights)
    slide = tensors["tiles"], tensors["coords"]
    layers = model.layer_embeddings(*slide, check_coords=False)
    assert layers.shape == (1, config.num_layers + 1, config.embed_dim)
    for layer in range(config.num_layers + 1):
        assert_close(layers[:, layer], tensors[f"all_layers.{layer}"])


@pytest.mark.parametrize(
    "options", [{"head_offset": "modulo"}, {"padded_keys": "ignore"}], ids=["offset", "padding"]
)
def test_other_rules_give_other_embeddings(options):
    config, weights, tensors = read()
    model = load(dataclasses.replace(config, pool="mean", **options), weights)
    slide = tensors["tiles"], tensors["coords"]
    assert (model(*slide, check_coords=False) - tensors["global_pool"]).abs().max() > 1e-3


def test_round_trip_is_exact():
    config, weights, _ = read()
    assert CONVERTER.is_published(weights)
    model = load(config, weights)
    again = CONVERTER.to_published(model)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], x) for key, x in weights.items())
    assert not CONVERTER.is_published(model.state_dict())


def test_released_size_has_the_published_keys():
    with torch.device("meta"):
        model = create_model("gigapath_slide_enc12l768d", **CONVERTER.options)
    published = CONVERTER.to_published(model)
    assert len(published) == 247
    assert published["patch_embed.proj.weight"].shape == (768, 1536)
    assert published["cls_token"].shape == (1, 1, 768)
    assert published["encoder.layers.11.ffn.ffn_layernorm.weight"].shape == (3072,)
    assert published.keys() >= {"encoder.layer_norm.bias", "norm.weight", "patch_embed.proj.bias"}


def test_keys_without_a_counterpart_are_all_listed():
    config, weights, _ = read()
    weights |= {"encoder.layers.2.ffn.fc1.bias": torch.zeros(1), "classifier.0.bias": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"GigaPath weights have 2 keys .* classifier\.0\.bias, encoder\.layers\.2"
    ):
        CONVERTER.from_published(weights, config)


def test_missing_keys_are_all_listed():
    config, weights, _ = read()
    del weights["norm.weight"], weights["encoder.layers.1.ffn.fc1.bias"]
    with pytest.raises(ValueError, match=r"2 missing \(norm\.weight, stack\.blocks\.1\.feed_"):
        load(config, weights)


def table(config):
    side = torch.arange(config.grid_size)
    cells = torch.cartesian_prod(side, side)
    positions = sincos_positions(cells, config.embed_dim, grid_size=config.grid_size)
    return torch.cat([torch.zeros(1, config.embed_dim), positions])[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fixed_positions_are_compared_and_left_out(dtype):
    config, weights, _ = read()
    expected = CONVERTER.from_published(weights, config)
    found = CONVERTER.from_published({**weights, "pos_embed": table(config).to(dtype)}, config)
    assert found.keys() == expected.keys()


def test_other_positions_are_refused():
    config, weights, _ = read()
    flipped, shifted = table(config), table(config)
    flipped[:, 1:] = flipped[:, 1:].roll(16, dims=2)
    shifted[:, 0] = 0.5
    with pytest.raises(ValueError, match=r"pos_embed must hold the fixed .* off by up to [12]\."):
        CONVERTER.from_published({**weights, "pos_embed": flipped}, config)
    with pytest.raises(ValueError, match=r"off by up to 0\.5"):
        CONVERTER.from_published({**weights, "pos_embed": shifted}, config)
    with pytest.raises(ValueError, match=r"off by up to (1|0\.9)"):
        CONVERTER.from_published({**weights, "pos_embed": table(config).int()}, config)
    with pytest.raises(ValueError, match="off by up to nan"):
        CONVERTER.from_published({**weights, "pos_embed": flipped * torch.nan}, config)
    with pytest.raises(ValueError, match=r"= \(1, 257, 32\), got \(1, 256, 32\)"):
        CONVERTER.from_published({**weights, "pos_embed": flipped[:, 1:]}, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swiglu"}, "activation='swiglu'; it computes activation='gelu'"),
        ({"norm": "pre_ln"}, "norm='pre_ln'; it computes norm='sub_ln'"),
        ({"num_kv_heads": 2}, "num_kv_heads=2; it computes num_kv_heads=4"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"bias": False}, "bias=False"),
        ({"num_classes": 3}, "num_classes=3; it computes num_classes=0"),
        ({"head_offset": "modulo"}, "head_offset='modulo'; it computes head_offset='block'"),
        ({"padded_keys": "ignore"}, "padded_keys='ignore'; it computes padded_keys='zero'"),
    ],
)
def test_models_that_the_published_code_cannot_run_are_refused(options, message):
    config, _, _ = read()
    with pytest.raises(NotImplementedError, match=message):
        CONVERTER.to_published(GigaPathSlideEncoder(dataclasses.replace(config, **options)))
