"""The parts that the text families share."""

import dataclasses
import math

import pytest
import torch

from longnet_zoo.models import LongNetLM, LongNetLMConfig, LongNetMLM, LongNetMLMConfig

SMALL = {
    "vocab_size": 61,
    "embed_dim": 24,
    "num_layers": 2,
    "num_heads": 4,
    "segment_lengths": (7, 16),
    "dilation_rates": (1, 3),
}


def make(**options):
    return LongNetLM(LongNetLMConfig(**{**SMALL, **options}))


TOKENS = torch.arange(40).reshape(2, 20)


def test_model_refuses_the_config_of_another_family():
    with pytest.raises(TypeError, match="LongNetLM takes a LongNetLMConfig, got LongNetMLMConfig"):
        LongNetLM(LongNetMLMConfig(**SMALL))
    with pytest.raises(TypeError, match="LongNetMLM takes a LongNetMLMConfig"):
        LongNetMLM(LongNetLMConfig(**SMALL))


@pytest.mark.parametrize("norm", ["sub_ln", "deepnorm", "pre_ln"])
def test_initial_gains_survive_construction(norm):
    model = make(embed_dim=128, num_layers=3, ffn_dim=256, norm=norm)
    gain = {"sub_ln": math.sqrt(math.log(6)), "deepnorm": 24**-0.25, "pre_ln": 1.0}[norm]
    for block in model.stack.blocks:
        square, wide = math.sqrt(2 / 256), math.sqrt(2 / (128 + 256))  # Xavier
        for layer, std in (
            (block.attention.q_proj, square),
            (block.attention.k_proj, square),
            (block.attention.v_proj, gain * square),
            (block.attention.out_proj, gain * square),
            (block.feed_forward.fc1, gain * wide),
            (block.feed_forward.fc2, gain * wide),
        ):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.04)
            assert not layer.bias.any()
    assert model.embedding.weight.std().item() == pytest.approx(128**-0.5, rel=0.04)


def test_initial_loss_is_that_of_guessing():
    model = make(vocab_size=1000, embed_dim=64, norm="sub_ln")
    tokens, labels = torch.randint(1000, (2, 4, 100))
    # Logits have a variance of one: half a nat above the uniform guess, on average.
    assert model.loss(tokens, labels).item() == pytest.approx(math.log(1000) + 0.5, abs=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"position": "rotary"},
        {"position": "alibi"},
        {"position": "relative", "relative_buckets": 8, "relative_max_distance": 30},
        {"position": None},
        {"norm": "pre_ln"},
        {"norm": "deepnorm"},
        {"activation": "swiglu"},
        {"qk_norm": True},
        {"bias": False},
        {"scale_embedding": True},
        {"head_offset": "block"},
        {"rotary_base": 100.0},
        {"xpos_scale_base": 8.0},
        {"eps": 1e-2},
        {"segment_lengths": (7, 20)},
        {"dilation_rates": (1, 2)},
    ],
    ids=str,
)
def test_every_option_changes_the_outputs(options):
    plain, other = make(), make(**options)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.5)
    other.load_state_dict(plain.state_dict(), strict=False)
    out = other(TOKENS)
    assert out.isfinite().all()
    assert not torch.allclose(plain(TOKENS), out, atol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_key_heads(num_kv_heads):
    grouped, full = make(num_kv_heads=num_kv_heads), make()
    state = grouped.state_dict()
    for key, x in state.items():
        if "k_proj" in key or "v_proj" in key:
            heads = x.unflatten(0, (num_kv_heads, 6))
            state[key] = heads.repeat_interleave(4 // num_kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(TOKENS), full(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rate", ["dropout", "attention_dropout", "activation_dropout", "drop_path"]
)
def test_dropout_acts_in_training_only(rate):
    model = make(**{rate: 0.5})
    assert not torch.equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_dropout_acts_on_the_embeddings_too():
    model, seen = make(dropout=0.5), []
    model.stack.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7


def test_embeds_stand_for_tokens():
    model = make(scale_embedding=True)
    embeds = model.embedding(TOKENS)
    assert torch.equal(model(inputs_embeds=embeds), model(TOKENS))
    labels = TOKENS.roll(-1, 1)
    assert torch.equal(model.loss(labels=labels, inputs_embeds=embeds), model.loss(TOKENS, labels))


def test_model_without_vocabulary_takes_embeds_and_gives_features():
    model = make(vocab_size=None)
    x = torch.randn(2, 20, 24)
    assert torch.equal(model(inputs_embeds=x), model.forward_features(inputs_embeds=x))
    assert "embedding.weight" not in model.state_dict()
    with pytest.raises(ValueError, match=r"no token embedding \(vocab_size=None\)"):
        model(TOKENS)


def test_tied_head_is_the_embedding_and_an_untied_one_is_not():
    assert "head.weight" not in make().state_dict()
    tied = make()
    assert tied.get_classifier() is tied.embedding
    untied = make(tie_embeddings=False, num_outputs=9)
    assert untied(TOKENS).shape == (2, 20, 9)
    assert untied.num_params() == tied.num_params() + 9 * 24
    assert untied.head.weight.std().item() == pytest.approx(24**-0.5, rel=0.2)


def test_reset_classifier_keeps_dtype():
    model = make().to(torch.bfloat16)
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.bfloat16


def test_relative_table_has_no_weight_decay():
    model = make(position="relative", relative_buckets=8, relative_max_distance=30)
    assert "stack.position_bias.embedding.weight" in model.no_weight_decay()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(), ValueError, "either tokens or inputs_embeds, got neither"),
        (
            lambda m: m(TOKENS, inputs_embeds=torch.zeros(2, 20, 24)),
            ValueError,
            "either tokens or inputs_embeds, got both",
        ),
        (lambda m: m(TOKENS.tolist()), TypeError, r"tokens must be a tensor .*, got list"),
        (lambda m: m.loss(TOKENS, TOKENS.tolist()), TypeError, "int64 tensor, got list"),
        (lambda m: m(TOKENS.float()), TypeError, r"int64 or int32, got torch\.float32"),
        (lambda m: m(TOKENS > 0), TypeError, r"int64 or int32, got torch\.bool"),
        (lambda m: m(TOKENS[0]), ValueError, r"tokens must be \(batch, seq_len\).*got \(20,\)"),
        (lambda m: m(TOKENS[:, :0]), ValueError, r"at least one token, got \(2, 0\)"),
        (lambda m: m(TOKENS + 41), ValueError, "vocab_size=61, got values from 41 to 80"),
        (lambda m: m(TOKENS - 1), ValueError, "got values from -1 to 38"),
        (
            lambda m: m(inputs_embeds=torch.zeros(2, 20, 23)),
            ValueError,
            r"embed_dim=24 .*got \(2, 20, 23\)",
        ),
        (lambda m: m(inputs_embeds=torch.zeros(2, 0, 24)), ValueError, r"got \(2, 0, 24\)"),
        (lambda m: m.loss(TOKENS), TypeError, "loss needs labels"),
        (lambda m: m.loss(TOKENS, TOKENS[:, 1:]), ValueError, r"\(2, 20\), got \(2, 19\)"),
        (lambda m: m.loss(TOKENS, TOKENS + 30), ValueError, "vocab_size=61"),
        (lambda m: m.reset_classifier(-1), ValueError, "num_outputs must be.*got -1"),
        (lambda m: m.reset_classifier(2.5), TypeError, "num_outputs must be.*got 2.5"),
    ],
)
def test_wrong_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(make())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": 2.5}, TypeError, r"num_layers must be an integer .*got 2.5 \(float\)"),
        ({"num_layers": True}, TypeError, r"num_layers must be .*got True \(bool\)"),
        ({"num_layers": 0}, ValueError, "num_layers must be an integer of at least 1, got 0"),
        ({"embed_dim": "24"}, TypeError, "embed_dim must be an integer .*got '24'"),
        ({"embed_dim": None}, TypeError, "embed_dim must be an integer .*got None"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be an integer .*or None, got 0"),
        ({"num_outputs": -3}, ValueError, "num_outputs must be .*at least 0 or None, got -3"),
        ({"num_heads": 5}, ValueError, "embed_dim=24 and num_heads=5"),
        ({"num_kv_heads": 3}, ValueError, "num_heads=4 and num_kv_heads=3"),
        ({"embed_dim": 12}, ValueError, "even head_dim .*embed_dim=12 and num_heads=4"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout must be a number in \[0, 1\), got -0.1"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number .*got '0.1'"),
        ({"dropout": False}, TypeError, "dropout must be a number .*got False"),
        ({"attention_dropout": 2}, ValueError, "attention_dropout must be .*got 2"),
        ({"activation_dropout": 1}, ValueError, "activation_dropout must be .*got 1"),
        ({"drop_path": float("nan")}, ValueError, "drop_path must be .*got nan"),
        ({"eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
        ({"xpos_scale_base": float("inf")}, ValueError, "xpos_scale_base must be .*got inf"),
        ({"rotary_base": 1.0}, ValueError, "rotary_base must be above 1, got 1.0"),
        ({"qk_norm": 1}, TypeError, "qk_norm must be True or False, got 1"),
        ({"tie_embeddings": None}, TypeError, "tie_embeddings must be True or False, got None"),
        (
            {"position": "learned"},
            ValueError,
            "position must be one of .*None, got 'learned'",
        ),
        ({"norm": None}, ValueError, "norm must be one of 'sub_ln', .*got None"),
        ({"activation": "relu"}, ValueError, "activation must be one of .*got 'relu'"),
        ({"backend": "flash9"}, ValueError, "backend must be one of .*got 'flash9'"),
        ({"head_offset": "mod"}, ValueError, "head_offset must be one of .*got 'mod'"),
        ({"segment_lengths": (16, 7)}, ValueError, r"strictly increasing, got \(16, 7\)"),
        ({"dilation_rates": (1,)}, ValueError, r"dilation_rates=\(1,\)"),
        ({"segment_lengths": 7}, TypeError, "segment_lengths must be a tuple .*got 7"),
        ({"num_outputs": 9}, ValueError, "num_outputs=9 and vocab_size=61.*tie_embeddings=False"),
        (
            {"position": "relative", "relative_buckets": 32, "relative_max_distance": 16},
            ValueError,
            "relative_max_distance must exceed 16, .*relative_buckets=32, got 16",
        ),
    ],
)
def test_config_refuses_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        LongNetLMConfig(**{**SMALL, **options})


@pytest.mark.parametrize("buckets", [2, 9])
def test_bidirectional_buckets_must_be_even(buckets):
    with pytest.raises(ValueError, match=f"relative_buckets must be an even .*got {buckets}"):
        LongNetMLMConfig(**{**SMALL, "position": "relative", "relative_buckets": buckets})


def test_config_is_frozen_and_takes_lists():
    config = LongNetLMConfig(**{**SMALL, "segment_lengths": [7, 16], "dilation_rates": [1, 3]})
    assert config == LongNetLMConfig(**SMALL)
    assert config.segment_lengths == (7, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3
    with pytest.raises(TypeError, match="num_headz"):
        LongNetLMConfig(num_headz=3)
