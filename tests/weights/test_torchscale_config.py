import pytest

from longnet_zoo.models import LongNetLMConfig
from longnet_zoo.weights import config_from_torchscale


def test_options_are_translated_one_by_one():
    config = config_from_torchscale(
        {
            "decoder_embed_dim": 48,
            "decoder_attention_heads": 6,
            "decoder_ffn_embed_dim": 50,
            "decoder_layers": 3,
            "dropout": 0.1,
            "attention_dropout": 0.2,
            "activation_dropout": 0.3,
            "drop_path_rate": 0.4,
            "layernorm_eps": 1e-6,
            "no_scale_embedding": False,
            "share_decoder_input_output_embed": True,
            "xpos_rel_pos": True,
            "xpos_scale_base": 256,
            "segment_length": [8, 20],
            "dilated_ratio": (1, 3),
            "vocab_size": 70,
            "seq_parallel": True,
        }
    )
    assert config == LongNetLMConfig(
        embed_dim=48,
        num_heads=6,
        ffn_dim=50,
        num_layers=3,
        dropout=0.1,
        attention_dropout=0.2,
        activation_dropout=0.3,
        drop_path=0.4,
        eps=1e-6,
        scale_embedding=True,
        tie_embeddings=True,
        position="xpos",
        xpos_scale_base=256.0,
        segment_lengths=(8, 20),
        dilation_rates=(1, 3),
        head_offset="block",
        padded_keys="zero",
        vocab_size=70,
    )


def test_missing_options_take_the_defaults_of_torchscale():
    config = config_from_torchscale({"encoder_layers": 2, "segment_length": ""})
    assert (config.embed_dim, config.num_heads, config.ffn_dim) == (768, 12, 3072)
    assert (config.norm, config.position, config.tie_embeddings) == ("sub_ln", None, False)
    assert (config.vocab_size, config.head_size) == (None, 0)
    # No segments: dense attention at any length.
    pairs = config.pattern.attended_pairs(100_003, 1)
    assert pairs == 100_003**2


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        ({}, "sub_ln"),
        ({"subln": False}, "pre_ln"),
        ({"deepnorm": True}, "deepnorm"),
        ({"deepnorm": True, "subln": True, "encoder_normalize_before": True}, "deepnorm"),
        ({"subln": True, "encoder_normalize_before": False}, "sub_ln"),
    ],
)
def test_norm_of_an_encoder(options, norm):
    assert config_from_torchscale({"encoder_layers": 2, **options}).norm == norm


def test_norm_of_a_decoder_follows_its_own_option():
    # DecoderConfig sets encoder_normalize_before by mistake, so its own option stays as given.
    assert config_from_torchscale({"decoder_layers": 2, "subln": False}).norm == "pre_ln"
    deep = {"decoder_layers": 2, "deepnorm": True, "decoder_normalize_before": False}
    assert config_from_torchscale(deep).norm == "deepnorm"
    for options in (
        {"decoder_layers": 2, "deepnorm": True},
        {"decoder_layers": 2, "decoder_normalize_before": False},
        {"encoder_layers": 2, "subln": False, "encoder_normalize_before": False},
    ):
        with pytest.raises(NotImplementedError, match=r"sub-LN, pre-LN or DeepNorm, got deepnorm="):
            config_from_torchscale(options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"encoder_layer": 2},
            ValueError,
            "'encoder_layer' for encoders. Did you mean 'encoder_la",
        ),
        ({"encoder_layers": 2, "qqqq": 1}, ValueError, r"no option 'qqqq' for encoders\.$"),
        ({"encoder_layers": 2, "decoder_layers": 2}, NotImplementedError, "encoder-decoder"),
        ({"vocab_size": 5}, ValueError, "named encoder_.* or decoder_.*got vocab_size"),
        ({}, ValueError, "got no options"),
        (
            {"encoder_layers": 2, "moe_freq": 2},
            NotImplementedError,
            "moe_freq=2 has no counterpart",
        ),
        ({"encoder_layers": 2, "multiway": True}, NotImplementedError, "multiway=True"),
        ({"encoder_layers": 2, "normalize_output": False}, NotImplementedError, "normalize_output"),
        ({"encoder_layers": 2, "layernorm_embedding": True}, NotImplementedError, "layernorm_embe"),
        ({"encoder_layers": 2, "activation_fn": "relu"}, NotImplementedError, "'relu'"),
        (
            {"encoder_layers": 2, "xpos_rel_pos": True, "rel_pos_buckets": 8, "max_rel_pos": 9},
            NotImplementedError,
            "xpos_rel_pos=True and rel_pos_buckets=8",
        ),
        ({"encoder_layers": 2, "segment_length": "[8]"}, ValueError, "come together, got segm"),
        (
            {"encoder_layers": 2, "segment_length": "open('x')", "dilated_ratio": "[1]"},
            ValueError,
            r"segment_length must be a list of integers .*got \"open\('x'\)\"",
        ),
        (
            {"encoder_layers": 2, "segment_length": "[8]", "dilated_ratio": 1},
            ValueError,
            "dilated_ratio must be a list of integers .*got 1",
        ),
    ],
)
def test_options_without_a_counterpart_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        config_from_torchscale(options)
