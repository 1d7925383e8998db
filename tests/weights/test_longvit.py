"""Published weights of LongViT: outputs of the original code, and names there and back."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models import adapt_input_conv

from longnet_zoo.factory import create_model
from longnet_zoo.models import LongViT, LongViTConfig
from longnet_zoo.weights import load_state_dict
from longnet_zoo.weights.longvit import CONVERTER

FIXTURE = Path(__file__).parents[1] / "fixtures" / "longvit.safetensors"
SMALL = LongViTConfig(
    img_size=20,
    patch_size=4,
    embed_dim=24,
    num_layers=2,
    num_heads=4,
    ffn_dim=40,
    segment_lengths=(6, 13),
    dilation_rates=(1, 2),
    **CONVERTER.options,
)


@pytest.fixture(scope="module")
def fixture():
    """Tensors of the fixture, the published state dict, and our config for it."""
    with safe_open(FIXTURE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        theirs = json.loads(file.metadata()["config"])
    config = LongViTConfig(
        img_size=theirs["img_size"],
        patch_size=theirs["patch_size"],
        embed_dim=theirs["embed_dim"],
        num_layers=theirs["depth"],
        num_heads=theirs["num_heads"],
        ffn_dim=int(theirs["embed_dim"] * theirs["mlp_ratio"]),
        segment_lengths=tuple(json.loads(theirs["segment_length"])),
        dilation_rates=tuple(json.loads(theirs["dilated_ratio"])),
        **CONVERTER.options,
    )
    published = {k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")}
    return tensors, published, config


def make(**options):
    """Makes a model with random values everywhere, so that no key is without effect."""
    model = LongViT(replace(SMALL, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("number", [0, 1], ids=["same-size", "larger-image"])
def test_published_outputs(fixture, number):
    tensors, published, config = fixture
    model = LongViT(config).eval()
    load_state_dict(model, CONVERTER.from_published(published, config))
    found = model.forward_features(tensors[f"image.{number}"])
    torch.testing.assert_close(found, tensors[f"tokens.{number}"], atol=1e-5, rtol=0)


def test_switches_of_new_models_give_something_else(fixture):
    tensors, published, config = fixture
    for option in ({"head_offset": "modulo"}, {"padded_keys": "ignore"}):
        model = LongViT(replace(config, **option)).eval()
        load_state_dict(model, CONVERTER.from_published(published, config))
        # 96 px: 144 tokens, so segments of 32 are incomplete.
        found = model.forward_features(tensors["image.1"])
        assert (found - tensors["tokens.1"]).abs().max() > 1e-2


def test_published_names_round_trip(fixture):
    _, published, config = fixture
    model = LongViT(config)
    load_state_dict(model, CONVERTER.from_published(published, config))
    back = CONVERTER.to_published(model)
    assert back.keys() == published.keys()
    torch.testing.assert_close(back, published, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"pos_embed", "patch_embed.proj.bias", "encoder.layers.1.ffn.fc1.weight"}),
        ({"num_classes": 3}, {"model.pos_embed", "fc_norm.weight", "head.bias"}),
        ({"final_norm": True}, {"backbone.pos_embed", "backbone.norm.weight"}),
    ],
    ids=["encoder", "classifier", "dino"],
)
def test_names_of_every_kind_of_file_round_trip(options, keys):
    model = make(**options)
    published = CONVERTER.to_published(model)
    assert keys <= published.keys()
    assert CONVERTER.is_published(published)
    assert not CONVERTER.is_published(model.state_dict())
    back = CONVERTER.from_published(published, model.config)
    assert back.keys() == model.state_dict().keys()
    torch.testing.assert_close(back, dict(model.state_dict()), atol=0, rtol=0)


def test_dino_checkpoint_without_its_projection_head():
    model = make(final_norm=True)
    teacher = {
        **CONVERTER.to_published(model),
        "head.mlp.0.weight": torch.zeros(7, 24),
        "head.mlp.0.bias": torch.zeros(7),
        "head.last_layer.weight_g": torch.ones(9, 1),
        "head.last_layer.weight_v": torch.ones(9, 7),
    }
    found = CONVERTER.from_published(teacher, model.config)
    torch.testing.assert_close(found, dict(model.state_dict()), atol=0, rtol=0)
    # Fine-tuning leaves the final norm out.
    found = CONVERTER.from_published(teacher, SMALL)
    assert found.keys() == LongViT(SMALL).state_dict().keys()
    # A head is never made up: what is missing is missing.
    found = CONVERTER.from_published(teacher, replace(SMALL, num_classes=2))
    with pytest.raises(ValueError, match=r"4 missing \(fc_norm.bias, .*head.weight"):
        load_state_dict(LongViT(replace(SMALL, num_classes=2)), found)


def test_create_model_reads_a_checkpoint_of_dino(tmp_path):
    saved = make(final_norm=True)
    teacher = {**CONVERTER.to_published(saved), "head.last_layer.weight_g": torch.ones(9, 1)}
    student = {f"module.{key}": torch.zeros_like(tensor) for key, tensor in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "dino.pth")
    options = {key: value for key, value in asdict(SMALL).items() if key not in CONVERTER.options}
    name, images = "longvit_small_patch32_1024", torch.randn(2, 3, 20, 24)
    model = create_model(name, pretrained=tmp_path / "dino.pth", **options | {"final_norm": True})
    assert model.config == saved.config  # with the published switches
    assert torch.equal(model.eval()(images), saved(images))
    model = create_model(name, pretrained=tmp_path / "dino.pth", **options)
    model.reset_classifier(2)
    assert model(images).shape == (2, 2)


@pytest.mark.parametrize("img_size", [32, (28, 12), (4, 100)])
def test_positions_are_resized_as_the_published_loader_does(img_size):
    published = CONVERTER.to_published(make())
    config = replace(SMALL, img_size=img_size)
    found = CONVERTER.from_published(published, config)["pos_embed"]
    image = published["pos_embed"].reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        image, size=config.grid, mode="bicubic", align_corners=False
    )
    assert torch.equal(found, expected.permute(0, 2, 3, 1).flatten(1, 2))


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_first_convolution_is_adapted_to_other_channels(in_chans):
    published = CONVERTER.to_published(make())
    config = replace(SMALL, in_chans=in_chans)
    found = CONVERTER.from_published(published, config)
    weight = published["patch_embed.proj.weight"]
    assert torch.equal(found["patch_embed.proj.weight"], adapt_input_conv(in_chans, weight))
    load_state_dict(LongViT(config), found)


def test_what_cannot_be_fitted_is_left_to_the_strict_load():
    published = CONVERTER.to_published(make(in_chans=1))
    published["pos_embed"] = published["pos_embed"][:, :24]  # no square
    found = CONVERTER.from_published(published, SMALL)
    with pytest.raises(ValueError, match=r"\(24, 1, 4, 4\) instead of .*\(1, 24, 24\) instead of"):
        load_state_dict(LongViT(SMALL), found)


def test_weights_of_two_models_are_refused():
    one = CONVERTER.to_published(make())
    both = {f"{prefix}.{key}": x for prefix in ("model", "backbone") for key, x in one.items()}
    with pytest.raises(ValueError, match=r"got both 'model\.pos_embed' and 'backbone\.pos_embed'"):
        CONVERTER.from_published(both, SMALL)


def test_unknown_keys_are_refused():
    published = CONVERTER.to_published(make(num_classes=3))
    message = r"LongViT .* 4 keys .*fc_norm.bias, .*, head.weight.*num_classes=3 as in .* reset_cl"
    with pytest.raises(ValueError, match=message):
        CONVERTER.from_published(published, SMALL)
    with pytest.raises(ValueError, match=r"1 keys .*cls_token"):
        CONVERTER.from_published({"cls_token": torch.zeros(1)}, SMALL)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2},
        {"norm": "pre_ln"},
        {"activation": "swiglu"},
        {"qk_norm": True},
        {"bias": False},
        {"eps": 1e-6},
        {"global_pool": ""},
        {"img_size": (20, 40)},
        {"padded_keys": "ignore"},
        {"head_offset": "modulo"},
    ],
)
def test_options_that_the_published_code_lacks_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(NotImplementedError, match=re.escape(f"counterpart of {name}={value!r}")):
        CONVERTER.to_published(LongViT(replace(SMALL, **options)))


def test_no_published_model_has_both_the_norm_of_dino_and_a_head():
    with pytest.raises(NotImplementedError, match="counterpart of final_norm=True"):
        CONVERTER.to_published(make(final_norm=True, num_classes=2))


def test_head_offset_is_free_where_nothing_is_dilated():
    options = {"segment_lengths": (30,), "dilation_rates": (1,), "head_offset": "modulo"}
    assert CONVERTER.to_published(make(**options)).keys() == CONVERTER.to_published(make()).keys()
