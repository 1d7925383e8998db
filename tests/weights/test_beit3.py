"""BEiT-3 under its published names: outputs of the original code, round trips, position tables."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from longnet_zoo.models import BEiT3, BEiT3Config
from longnet_zoo.weights import load_state_dict
from longnet_zoo.weights.beit3 import CONVERTER
from tests.models.beit3_draws import ALL_HEADS, all_inputs, draw, make, make_config

FIXTURE = "tests/fixtures/torchscale_beit3.safetensors"


def read_fixture():
    """Our config, published weights, and the inputs and outputs of the original code."""
    with safe_open(FIXTURE, "pt") as file:
        options = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = BEiT3Config(
        img_size=options["img_size"],
        patch_size=options["patch_size"],
        vocab_size=options["vocab_size"],
        max_text_len=options["max_source_positions"] - 2,
        embed_dim=options["encoder_embed_dim"],
        num_layers=options["encoder_layers"],
        num_heads=options["encoder_attention_heads"],
        ffn_dim=options["encoder_ffn_embed_dim"],
        final_norm=options["normalize_output"],
    )
    prefix = "model."
    weights = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    return config, weights, tensors


def load(weights, config):
    model = BEiT3(config).eval()
    load_state_dict(model, CONVERTER.from_published(weights, config))
    return model


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("prefix", ["", "beit3."])
def test_outputs_of_the_original_code(prefix):
    config, weights, tensors = read_fixture()
    model = load({f"{prefix}{key}": x for key, x in weights.items()}, config)
    image, tokens = tensors["image"], tensors["tokens"]
    padding = tensors["text_padding_mask"].bool()
    assert padding.any()
    out = model.forward_features(image)
    torch.testing.assert_close(out, tensors["out.image"], atol=1e-5, rtol=0)
    out = model.forward_features(tokens=tokens, text_padding_mask=padding)
    expected = tensors["out.text"]
    torch.testing.assert_close(out[~padding], expected[~padding], atol=1e-5, rtol=0)
    out = model.forward_features(image, tokens, text_padding_mask=padding)
    expected, is_token = tensors["out.image_text"], functional.pad(~padding, (17, 0), value=True)
    torch.testing.assert_close(out[is_token], expected[is_token], atol=1e-5, rtol=0)


def test_round_trip_of_published_weights():
    config, weights, _ = read_fixture()
    published = CONVERTER.to_published(load(weights, config))
    assert all(key.startswith("beit3.") for key in published)
    assert_same({key.removeprefix("beit3."): x for key, x in published.items()}, weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        ALL_HEADS,
        {"num_classes": 5, "global_pool": "avg", "final_norm": False},
        {"num_classes": 5, "global_pool": "avg", "final_norm": False, "vocab_size": None},
    ],
    ids=["plain", "all heads", "classifier", "images alone"],
)
def test_round_trip_of_our_models(options):
    model = make(**options).eval()
    published = CONVERTER.to_published(model)
    assert CONVERTER.is_published(published)
    assert not CONVERTER.is_published(model.state_dict())
    other = load(published, model.config)
    assert_same(other.state_dict(), model.state_dict())
    image = draw()[0]
    assert torch.equal(other(image), model(image))


def test_published_names_of_the_heads():
    """As in unilm's beit3/modeling_finetune.py; mim_head as in the pretrained files."""
    published = CONVERTER.to_published(make(**ALL_HEADS))
    heads = {key: tuple(x.shape) for key, x in published.items() if not key.startswith("beit3.")}
    assert heads == {
        "mim_head.weight": (37, 24),
        "mim_head.bias": (37,),
        "mlm_head.weight": (61, 24),
        "mlm_head.bias": (61,),
        "vision_head.weight": (24, 24),
        "language_head.weight": (24, 24),
        "logit_scale": (),
        "pooler.norm.weight": (24,),
        "pooler.norm.bias": (24,),
        "pooler.dense.weight": (24, 24),
        "pooler.dense.bias": (24,),
        "head.0.weight": (48, 24),
        "head.0.bias": (48,),
        "head.1.weight": (48,),
        "head.1.bias": (48,),
        "head.3.weight": (5, 48),
        "head.3.bias": (5,),
    }
    published = CONVERTER.to_published(make(num_classes=5, global_pool="avg"))
    heads = {key: tuple(x.shape) for key, x in published.items() if not key.startswith("beit3.")}
    assert heads == {
        "fc_norm.weight": (24,),
        "fc_norm.bias": (24,),
        "head.weight": (5, 24),
        "head.bias": (5,),
    }


def test_what_a_model_does_not_have_is_left_out():
    model = make(**ALL_HEADS).eval()
    published = CONVERTER.to_published(model)
    image = draw()[0]
    plain = load(published, make_config())
    assert torch.equal(plain.forward_features(image), model.forward_features(image))
    alone = load(published, make_config(vocab_size=None))
    assert torch.equal(alone.forward_features(image), model.forward_features(image))
    without_norm = load(published, make_config(final_norm=False))
    assert without_norm.stack.norm is None
    # NLVR2's head has other names.
    published["head.dense1.weight"] = torch.zeros(2, 2)
    load(published, make_config())


def test_what_the_weights_do_not_have_is_not_made_up():
    published = CONVERTER.to_published(make(final_norm=False))
    with pytest.raises(ValueError, match=r"4 missing \(stack\.norm\.experts\.0\.bias"):
        load(published, make_config())
    published = CONVERTER.to_published(make(vocab_size=None))
    with pytest.raises(
        ValueError, match=r"missing .*text_embed\.positions\.weight, text_embed\.tok"
    ):
        load(published, make_config())
    published = CONVERTER.to_published(make(num_classes=5, global_pool="avg"))
    with pytest.raises(ValueError, match=r"4 keys without .*: fc_norm\.bias, .*head\.weight"):
        load(published, make_config(num_classes=5))
    without_head = CONVERTER.to_published(make())
    with pytest.raises(ValueError, match=r"missing .*classifier\.pooler\.weight"):
        load(without_head, make_config(num_classes=5))
    with pytest.raises(ValueError, match=r"classifier.head.weight: \(5, 24\) instead of \(7, 24\)"):
        load(published, make_config(num_classes=7, global_pool="avg"))


@pytest.mark.parametrize("key", ["head.weird", "pooler.weird", "mim_head.weird", "vision_head.x"])
def test_unknown_keys_of_a_head_that_the_model_has_are_refused(key):
    published = {**CONVERTER.to_published(make(**ALL_HEADS)), key: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"1 keys without .*: {key}"):
        load(published, make_config(**ALL_HEADS))
    load(published, make_config())


def test_weights_of_two_models_are_refused():
    published = CONVERTER.to_published(make())
    published["vision_embed.cls_token"] = torch.zeros(1, 1, 24)
    message = r"one model, got both 'beit3\.vision_embed\.cls_token' and 'vision_embed\.cls_token'"
    with pytest.raises(ValueError, match=message):
        load(published, make_config())


def test_unknown_keys_are_all_listed():
    published = CONVERTER.to_published(make())
    published |= {"beit3.encoder.extra": torch.zeros(1), "relative": torch.zeros(1)}
    published |= {"beit3.encoder.layers.2.ffn.A.fc1.bias": torch.zeros(1)}
    message = r"3 keys without .*: encoder\.extra, encoder\.layers\.2\.ffn\.A\.fc1\.bias, relative"
    with pytest.raises(ValueError, match=message):
        CONVERTER.from_published(published, make_config())


@pytest.mark.parametrize("img_size", [10, 30, 35])
def test_positions_of_images_are_interpolated(img_size):
    published = CONVERTER.to_published(make())
    key = "beit3.encoder.embed_positions.A.weight"
    model = load(published, make_config(img_size=img_size))
    old, new, size = published[key], model.image_embed.positions.weight, img_size // 5
    assert new.shape == (3 + size**2, 24)
    # The unused rows and the class token stay as they are.
    assert torch.equal(new[:3], old[:3])
    grid = old[3:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, (size, size), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new[3:], grid.permute(0, 2, 3, 1).reshape(-1, 24))
    # Rows of patches stay rows: a table that grows downwards still does.
    published[key] = torch.cat([torch.zeros(3), torch.arange(4.0).repeat_interleave(4)])[:, None]
    published[key] = published[key].expand(-1, 24)
    model = load(published, make_config(img_size=img_size))
    grid = model.image_embed.positions.weight[3:].unflatten(0, (size, size))
    assert (grid.diff(dim=0) > 0).all()
    torch.testing.assert_close(grid.diff(dim=1), torch.zeros(size, size - 1, 24), atol=1e-5, rtol=0)


def test_half_types_are_kept():
    published = {key: x.to(torch.bfloat16) for key, x in CONVERTER.to_published(make()).items()}
    converted = CONVERTER.from_published(published, make_config(img_size=30, max_text_len=20))
    assert {x.dtype for x in converted.values()} == {torch.bfloat16}


@pytest.mark.parametrize("rows", [2, 3, 18])
def test_positions_of_no_square_are_refused(rows):
    published = CONVERTER.to_published(make())
    published["beit3.encoder.embed_positions.A.weight"] = torch.zeros(rows, 24)
    with pytest.raises(ValueError, match=rf"each patch of a square, got {rows} rows"):
        CONVERTER.from_published(published, make_config())


@pytest.mark.parametrize("max_text_len", [9, 40])
def test_positions_of_texts_are_cut_or_repeated(max_text_len):
    model = make().eval()
    published = CONVERTER.to_published(model)
    other = load(published, make_config(max_text_len=max_text_len))
    table, new = model.text_embed.positions.weight, other.text_embed.positions.weight
    assert len(new) == max_text_len + 2
    assert torch.equal(new[:2], table[:2])
    for position in range(max_text_len):
        assert torch.equal(new[2 + position], table[2 + position % 13])
    # Texts that fit both keep their outputs.
    for inputs in all_inputs():
        assert torch.equal(other.forward_features(**inputs), model.forward_features(**inputs))


def test_long_texts_and_large_images_with_the_same_weights():
    published = CONVERTER.to_published(make())
    options = {"segment_lengths": (32, 128), "dilation_rates": (1, 4)}
    model = load(published, make_config(img_size=60, max_text_len=500, **options))
    out = model.forward_features(torch.randn(1, 3, 60, 60), torch.randint(61, (1, 500)))
    assert out.shape == (1, 145 + 500, 24)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swiglu"}, "activation='swiglu'; it computes activation='gelu'"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"bias": False}, "bias=False"),
        ({"norm": "pre_ln"}, "norm='pre_ln'"),
        ({"segment_lengths": (29,)}, r"segment_lengths=\(29,\)"),
        ({"segment_lengths": (7, 100), "dilation_rates": (1, 2)}, r"segment_lengths=\(7, 100\)"),
        ({"segment_lengths": (100,), "dilation_rates": (2,)}, r"segment_lengths=\(100,\)"),
    ],
)
def test_models_that_the_published_code_cannot_run_are_refused(options, message):
    model = BEiT3(replace(make_config(), **options))
    with pytest.raises(NotImplementedError, match=message):
        CONVERTER.to_published(model)


def test_one_segment_for_all_tokens_is_published():
    model = make(segment_lengths=(30,), dilation_rates=(1,))  # 17 of an image, 13 of a text
    assert CONVERTER.to_published(model)
