"""Conversion without torchscale: stored outputs, what is refused, and what goes back."""

import argparse
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from longnet_zoo.interop.torchscale import from_torchscale, to_torchscale_state_dict
from longnet_zoo.models import BEiT3, BEiT3Config, LongNetLM, LongNetMLM, LongViT, LongViTConfig
from tests.interop import torchscale_skeletons as skeletons
from tests.models.beit3_draws import make

DECODERS = ["longnet_decoder", "longnet_decoder_xpos"]
ENCODERS = ["longnet_encoder", "longnet_encoder_xpos_postnorm", "encoder_relative_bias"]
LONGNET = {
    "segment_lengths": (8, 16, 32),
    "dilation_rates": (1, 2, 4),
    "head_offset": "block",
    "padded_keys": "zero",
}


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_longnet_decoder(name):
    module, tensors = skeletons.read(name)
    model = from_torchscale(module)
    assert isinstance(model, LongNetLM)
    assert {option: getattr(model.config, option) for option in LONGNET} == LONGNET
    assert_close(model(tensors["tokens"]), tensors["logits"])


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name):
    module, tensors = skeletons.read(name)
    model = from_torchscale(module)
    assert isinstance(model, LongNetMLM)
    assert model.config.pattern.is_dense == (name == "encoder_relative_bias")
    padding = tensors.get("padding_mask", torch.zeros(tensors["input"].shape[:2])).bool()
    mask = padding if padding.any() else None
    out = model(inputs_embeds=tensors["input"], key_padding_mask=mask)
    assert_close(out[~padding], tensors["encoder_out"][~padding])


def test_beit3():
    module, tensors = skeletons.read("beit3")
    model = from_torchscale(module)
    assert isinstance(model, BEiT3)
    image, tokens = tensors["image"], tensors["tokens"]
    padding = tensors["text_padding_mask"].bool()
    assert_close(model.forward_features(image), tensors["out.image"])
    out = model.forward_features(tokens=tokens, text_padding_mask=padding)
    assert_close(out[~padding], tensors["out.text"][~padding])
    out = model.forward_features(image, tokens, text_padding_mask=padding)
    kept = functional.pad(~padding, (17, 0), value=True)
    assert_close(out[kept], tensors["out.image_text"][kept])


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, "beit3"])
def test_weights_go_back(name):
    module, _ = skeletons.read(name)
    theirs, ours = module.state_dict(), to_torchscale_state_dict(from_torchscale(module))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_longnet_obeys_a_padding_mask():
    """torchscale's LongNet drops it, so that padding changes its outputs."""
    model = from_torchscale(skeletons.read("longnet_encoder")[0])
    x, lengths = torch.randn(3, 45, 32), [45, 21, 3]
    mask = torch.arange(45) >= torch.tensor(lengths)[:, None]
    out = model(inputs_embeds=x, key_padding_mask=mask)
    for row, length in enumerate(lengths):
        alone = model(inputs_embeds=x[row : row + 1, :length])
        assert_close(out[row : row + 1, :length], alone)


def test_xpos_of_a_decoder_stays_finite():
    """torchscale's overflows float32 from about 72,000 tokens on."""
    module, _ = skeletons.read("longnet_decoder_xpos")
    model = from_torchscale(module)
    model.reset_classifier(0)
    with torch.no_grad():
        assert model(torch.randint(50, (1, 80_000))).isfinite().all()


def test_plain_modules_are_dense_whatever_their_options_say():
    module, _ = skeletons.read("encoder_relative_bias")
    module.args.segment_length, module.args.dilated_ratio = "[8]", "[1]"
    model = from_torchscale(module)
    assert model.config.pattern.is_dense


def test_options_may_be_a_mapping_or_a_namespace():
    module, tensors = skeletons.read("longnet_decoder")
    options = vars(module.args)
    for args in (options, argparse.Namespace(**options, encoder_layers=7)):
        module.args = args
        assert_close(from_torchscale(module)(tensors["tokens"]), tensors["logits"])


def test_copies_of_torchscale_and_their_subclasses_serve():
    module, tensors = skeletons.read("longnet_encoder")
    vendored = {"__module__": "gigapath.torchscale.architecture.encoder"}
    parent = type("Encoder", (nn.Module,), vendored)
    module.__class__ = type("MyEncoder", (parent,), {})
    assert_close(from_torchscale(module)(inputs_embeds=tensors["input"]), tensors["encoder_out"])


class Encoder(nn.Module):
    """An encoder of somebody else."""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"live module, got None\."),
        (skeletons.Encoder, r"live module, got <class .*torchscale\.architecture\.encoder\.Encod"),
        ({"layers.0": 1}, r"live module, got \{'layers\.0': 1\}\."),
        (Encoder(), r"got a Encoder of tests\.interop\.test_torchscale_fixtures\.$"),
        (skeletons.MultiheadAttention(), r"got a MultiheadAttention of torchscale\.component"),
        (nn.Sequential(nn.Identity(), skeletons.BEiT3()), r"got a Sequential .* Pass its part '1'"),
    ],
    ids=["none", "class", "state dict", "other", "attention", "wrapper"],
)
def test_other_modules_are_refused(module, message):
    with pytest.raises(TypeError, match=message):
        from_torchscale(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe_freq": 2}, r"moe_freq=2 .*only 0 has\. Only what was built with that can be"),
        ({"multiway": True}, "multiway=True"),
        ({"layernorm_embedding": True}, "layernorm_embedding=True"),
        ({"activation_fn": "swish"}, "activation_fn='swish'"),
        ({"normalize_output": False}, "normalize_output=False"),
        ({"subln": False, "encoder_normalize_before": False}, "encoder_normalize_before=False"),
        ({"xpos_rel_pos": True}, "xpos_rel_pos=True and rel_pos_buckets=16"),
    ],
)
def test_options_without_a_counterpart_are_refused(options, message):
    module, _ = skeletons.read("encoder_relative_bias")
    module.args = {**vars(module.args), **options}
    with pytest.raises(NotImplementedError, match=message):
        from_torchscale(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiway": False}, "multiway=False .*only True has"),
        ({"moe_freq": 1}, "moe_freq=1"),
        ({"layernorm_embedding": True}, "layernorm_embedding=True"),
        ({"no_scale_embedding": False}, "no_scale_embedding=False .*only True has"),
        ({"rel_pos_buckets": 8, "max_rel_pos": 9}, "rel_pos_buckets=8"),
        ({"share_encoder_input_output_embed": True}, "share_encoder_input_output_embed=True"),
        ({"xpos_rel_pos": True}, "xpos_rel_pos=True"),
    ],
)
def test_options_of_beit3_without_a_counterpart_are_refused(options, message):
    module, _ = skeletons.read("beit3")
    module.args = {**vars(module.args), **options}
    with pytest.raises(NotImplementedError, match=message):
        from_torchscale(module)


def test_unknown_options_are_refused():
    module, _ = skeletons.read("longnet_decoder")
    module.args.decoder_gate = 1
    with pytest.raises(ValueError, match="no option 'decoder_gate' for decoders"):
        from_torchscale(module)
    for args in (None, {}, 7):
        module.args = args
        with pytest.raises(ValueError, match=rf"args must hold the options .*got {args}"):
            from_torchscale(module)
    module, _ = skeletons.read("longnet_decoder")
    del module.args.segment_length
    with pytest.raises(ValueError, match=r"LongNet needs .*segment_length=None"):
        from_torchscale(module)


def with_part(name, part, value):
    module, _ = skeletons.read(name)
    setattr(module, part, value)
    return module


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("embed_positions", nn.Embedding(9, 32), "embed_positions=Embedding has no counterpart"),
        ("embed_tokens", nn.Embedding(50, 32, max_norm=1.0), "without max_norm, .*max_norm=1.0"),
        ("embed_tokens", nn.Linear(50, 32), r"without max_norm, .*got Linear\(in_features=50"),
        ("output_projection", nn.Linear(32, 50), r"without bias, .*got Linear\(.*bias=True"),
        ("output_projection", nn.Identity(), r"without bias, .*got Identity\(\)"),
    ],
)
def test_parts_without_a_counterpart_are_refused(part, value, message):
    with pytest.raises(NotImplementedError, match=message):
        from_torchscale(with_part("longnet_decoder", part, value))


def test_modules_that_differ_from_their_options_are_refused():
    module, _ = skeletons.read("longnet_encoder")
    module.layers[1].self_attn.__class__ = skeletons.MultiheadAttention
    message = "or all DilatedAttention, got DilatedAttention, MultiheadAttention"
    with pytest.raises(NotImplementedError, match=message):
        from_torchscale(module)
    module.layers[1].self_attn.__class__ = module.layers[0].self_attn.__class__ = nn.Identity
    with pytest.raises(NotImplementedError, match="or all DilatedAttention, got Identity"):
        from_torchscale(module)
    module.layers = nn.ModuleList()
    with pytest.raises(NotImplementedError, match="got no layers"):
        from_torchscale(module)
    module, _ = skeletons.read("longnet_encoder")
    module.layers[1].normalize_before = False
    message = r"normalize_before=True and alpha=1, got normalize_before=False and .* in layers\.1"
    with pytest.raises(NotImplementedError, match=message):
        from_torchscale(module)
    module, _ = skeletons.read("longnet_encoder")
    del module.layers[1]
    with pytest.raises(ValueError, match=r"module LongNetEncoder does not fit .* 20 missing"):
        from_torchscale(module)
    module, _ = skeletons.read("beit3")
    module.args.vocab_size = 59
    with pytest.raises(ValueError, match=r"text_embed.tokens.weight: \(60, 32\) instead of \(59"):
        from_torchscale(module)
    module, _ = skeletons.read("beit3")
    module.encoder.extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"torchscale's BEiT3 weights have 1 keys .*encoder\.extr"):
        from_torchscale(module)
    module, _ = skeletons.read("beit3")
    for layer in module.encoder.layers:
        layer.self_attn.__class__ = skeletons.DilatedAttention
    with pytest.raises(NotImplementedError, match=r"BEiT3 must have .*got DilatedAttention"):
        from_torchscale(module)


def test_parameters_of_several_types_are_refused():
    module, _ = skeletons.read("longnet_decoder")
    module.layers.bfloat16()
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 on cpu, torch\.float32 on cpu"):
        from_torchscale(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": None}, "vocab_size=None; it computes vocab_size='a number of tokens'"),
        ({"heads": ("masked_image",)}, "heads=.*'masked_image'"),
        ({"num_classes": 5}, "num_classes=5"),
        ({"segment_lengths": (7,)}, r"segment_lengths=\(7,\)"),
        ({"qk_norm": True}, "torchscale's BEiT3 has no counterpart of qk_norm=True"),
    ],
)
def test_a_beit3_that_torchscale_does_not_have_is_refused(options, message):
    with pytest.raises(NotImplementedError, match=message):
        to_torchscale_state_dict(make(**options))


def test_other_models_are_not_renamed():
    model = from_torchscale(skeletons.read("encoder_relative_bias")[0])
    config = replace(model.config, **LONGNET)
    with pytest.raises(NotImplementedError, match=r"no relative bias, .*\(8, 16, 32\)"):
        to_torchscale_state_dict(LongNetMLM(config))
    with pytest.raises(NotImplementedError, match="rotary"):
        to_torchscale_state_dict(LongNetMLM(replace(model.config, position="rotary")))
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
    config = LongViTConfig(**sizes, segment_lengths=(4,), dilation_rates=(1,))
    with pytest.raises(NotImplementedError, match="got a LongViT"):
        to_torchscale_state_dict(LongViT(config))
    with pytest.raises(TypeError, match=r"must be a LongNetLM, .*got Linear"):
        to_torchscale_state_dict(nn.Linear(2, 2))


def test_beit3_of_any_norm_has_names():
    for norm, count in (("sub_ln", 2), ("pre_ln", 0), ("deepnorm", 0)):
        model = BEiT3(BEiT3Config(**{**vars(make().config), "norm": norm, "num_layers": 1}))
        names = to_torchscale_state_dict(model)
        assert sum(".inner_attn_ln." in name for name in names) == 2 * count
        assert ("encoder.layer_norm.A.weight" in names) == (norm != "deepnorm")
