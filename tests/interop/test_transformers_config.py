"""The config of our models under Transformers' conventions."""

import json
from dataclasses import fields

import pytest
from transformers import AutoConfig

import longnet_zoo as lz
from longnet_zoo.interop.transformers import LongNetConfig
from longnet_zoo.models import LongNetLMConfig, LongNetMLMConfig, TextConfig
from longnet_zoo.ops.branches import BigBirdBlocks, HashBuckets

from .longnet_toys import SIZES


@pytest.mark.parametrize("config_class", [LongNetLMConfig, LongNetMLMConfig])
def test_config_carries_every_option_of_our_text_models(config_class):
    other = {
        "vocab_size": 67,
        "embed_dim": 48,
        "num_layers": 5,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_dim": 80,
        "segment_lengths": (7, 21),
        "dilation_rates": (1, 2),
        "head_offset": "block",
        "padded_keys": "zero",
        "norm": "pre_ln",
        "activation": "swiglu",
        "qk_norm": True,
        "bias": False,
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "activation_dropout": 0.3,
        "drop_path": 0.4,
        "eps": 1e-6,
        "backend": "sdpa",
        "position": "relative",
        "rotary_base": 500.0,
        "xpos_scale_base": 64.0,
        "relative_buckets": 16,
        "relative_max_distance": 40,
        "tie_embeddings": False,
        "scale_embedding": True,
    }
    elsewhere = {"num_outputs", "extra_branches"}  # heads, and the next test
    assert {*other} | elsewhere == {field.name for field in fields(TextConfig)}
    theirs = config_class(**other)
    ours = LongNetConfig.from_zoo(theirs, eos_token_id=3)
    assert ours.to_zoo() == theirs
    assert (ours.is_causal, ours.eos_token_id) == (config_class.is_causal, 3)
    assert (ours.hidden_size, ours.num_hidden_layers, ours.num_attention_heads) == (48, 5, 4)
    assert ours.tie_word_embeddings is False


def test_config_carries_extra_branches_through_json(tmp_path):
    branches = (HashBuckets(num_buckets=8, seed=3), BigBirdBlocks(block_size=16))
    ours = LongNetLMConfig(position="rotary", extra_branches=branches)
    LongNetConfig.from_zoo(ours).save_pretrained(tmp_path)
    assert LongNetConfig.from_pretrained(tmp_path).to_zoo() == ours


def test_config_defaults_are_those_of_our_models():
    assert LongNetConfig().to_zoo() == LongNetLMConfig()
    assert LongNetConfig(is_causal=False).to_zoo() == LongNetMLMConfig()


def test_config_takes_the_names_of_transformers():
    config = LongNetConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert (config.embed_dim, config.num_layers, config.num_heads) == (64, 2, 4)


def test_config_survives_a_folder(tmp_path):
    config = LongNetConfig(**SIZES, position=None, pad_token_id=0, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LongNetConfig
    config.name_or_path = again.name_or_path
    assert again.to_dict() == config.to_dict()
    assert again.to_zoo() == config.to_zoo()
    assert again.segment_lengths == (5, 11)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longnet"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 25}, ValueError, "embed_dim=25 and num_heads=3"),
        ({"segment_lengths": [5]}, ValueError, r"\(5,\)"),
        ({"vocab_size": None}, TypeError, "vocab_size must be an integer, got None"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    ],
)
def test_config_refuses_what_our_models_refuse(options, error, message):
    with pytest.raises(error, match=message):
        LongNetConfig(**{**SIZES, **options})


def test_config_refuses_other_families():
    with pytest.raises(TypeError, match="LongNetMLMConfig, got LongViTConfig"):
        LongNetConfig.from_zoo(lz.model_info("longvit_tiny_patch8_64").config)
