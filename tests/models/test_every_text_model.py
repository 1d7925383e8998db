"""What holds for every registered text model, made small by its options."""

from dataclasses import replace

import pytest
import torch

from longnet_zoo.factory import create_model, list_models, model_info
from longnet_zoo.registry import find_model
from longnet_zoo.weights import load_state_dict

NAMES = list_models(modality="text")
VOCAB_SIZE, EMBED_DIM, SEQ_LEN = 61, 24, 43
# Awkward on purpose: no segment divides the length, rates do not divide segments or heads.
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "embed_dim": EMBED_DIM,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 40,
    "segment_lengths": (7, 16, 30),
    "dilation_rates": (1, 2, 3),
}
# One name of each kind: made small, models that differ in sizes alone are the same model.
KINDS = list({replace(find_model(name).config, **SMALL): name for name in NAMES}.values())


def make(name, **options):
    return create_model(name, **{**SMALL, **options})


def draw(batch=2, seq_len=SEQ_LEN):
    return torch.randint(VOCAB_SIZE, (batch, seq_len)), torch.randint(VOCAB_SIZE, (batch, seq_len))


def test_catalogue_has_the_names_of_the_papers():
    assert set(NAMES) >= {
        "longnet_lm_tiny",
        "longnet_lm_base",
        "longnet_lm_350m",
        "longnet_lm_760m",
        "longnet_lm_2b7",
        "longnet_mlm_tiny",
        "longnet_mlm_base",
    }
    assert len(NAMES) == len(set(NAMES)) >= 7
    assert {name.split("_")[1] for name in KINDS} == {"lm", "mlm"}


@pytest.mark.parametrize("name", NAMES)
def test_model_gives_logits_and_a_loss(name):
    model = make(name)
    tokens, labels = draw()
    logits = model(tokens)
    assert logits.shape == (2, SEQ_LEN, VOCAB_SIZE)
    features = model.forward_features(tokens)
    assert features.shape == (2, SEQ_LEN, EMBED_DIM)
    assert torch.equal(model.forward_head(features), logits)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model.loss(tokens, labels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 61])
def test_any_length_works(name, seq_len):
    tokens, _ = draw(batch=1, seq_len=seq_len)
    assert make(name)(tokens).isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_round_trip(name):
    model, other = make(name), make(name)
    tokens, _ = draw()
    assert not torch.equal(model(tokens), other(tokens))
    load_state_dict(other, model.state_dict())
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}], ids=["tied", "untied"])
def test_every_parameter_gets_a_gradient(name, options):
    model = make(name, **options)
    model.loss(*draw(), reduction="sum").backward()
    without = [
        key for key, x in model.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0
    ]
    assert not without


@pytest.mark.parametrize("name", KINDS)
def test_reset_classifier_replaces_the_head_and_keeps_the_features(name):
    model = make(name)
    tokens, _ = draw()
    features = model.forward_features(tokens)
    model.reset_classifier(5)
    assert torch.equal(model.forward_features(tokens), features)
    assert model(tokens).shape == (2, SEQ_LEN, 5)
    assert model.get_classifier().weight.shape == (5, EMBED_DIM)
    # The config describes the new model.
    again = type(model)(model.config)
    load_state_dict(again, model.state_dict())
    assert torch.equal(again(tokens), model(tokens))

    model.reset_classifier(0)
    assert model.get_classifier() is None
    assert torch.equal(model(tokens), features)
    with pytest.raises(ValueError, match="num_outputs=0"):
        model.loss(tokens, tokens)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_is_close_to_float32(name):
    model = make(name)
    tokens, labels = draw()
    logits, loss = model(tokens), model.loss(tokens, labels)
    model.to(torch.bfloat16)
    error = (model(tokens).float() - logits).norm() / logits.norm()
    assert model(tokens).dtype == torch.bfloat16
    assert 0 < error < 0.03  # bfloat16 rounds to 0.004
    half_loss = model.loss(tokens, labels)
    assert half_loss.dtype == torch.float32
    torch.testing.assert_close(half_loss, loss, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_autocast_is_close_to_float32(name):
    model = make(name)
    tokens, labels = draw()
    logits, loss = model(tokens), model.loss(tokens, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_logits, half_loss = model(tokens), model.loss(tokens, labels)
    half_loss.backward()
    assert half_logits.dtype == torch.bfloat16
    assert 0 < (half_logits.float() - logits).norm() / logits.norm() < 0.03
    torch.testing.assert_close(half_loss, loss, atol=0.02, rtol=0)
    assert all(x.grad.dtype == torch.float32 for x in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_does_not_change_gradients(name):
    model = make(name)
    tokens, labels = draw()
    model.loss(tokens, labels).backward()
    grads = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model.loss(tokens, labels).backward()
    torch.testing.assert_close(grads, [x.grad for x in model.parameters()], atol=0, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences_equal_the_sequences_one_by_one(name):
    model = make(name)
    lengths = (13, 1, 29)
    rows = [draw(batch=1, seq_len=length)[0] for length in lengths]
    cu_seqlens = torch.tensor([0, 13, 14, 43], dtype=torch.int32)
    packed = model(torch.cat(rows, dim=1), cu_seqlens=cu_seqlens)
    alone = torch.cat([model(row) for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_padded_batch_equals_the_sequences_one_by_one(name):
    model = make(name)
    tokens, labels = draw(batch=3)
    lengths = (SEQ_LEN, 17, 1)
    mask = torch.arange(SEQ_LEN) >= torch.tensor(lengths)[:, None]
    logits = model(tokens, key_padding_mask=mask)
    losses = model.loss(
        tokens, labels.masked_fill(mask, -100), key_padding_mask=mask, reduction="none"
    )
    assert (losses[mask] == 0).all()
    for row, length in enumerate(lengths):
        short = tokens[row : row + 1, :length]
        torch.testing.assert_close(logits[row, :length], model(short)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            losses[row, :length].sum(),
            model.loss(short, labels[row : row + 1, :length], reduction="sum"),
            atol=1e-4,
            rtol=1e-5,
        )


@pytest.mark.parametrize("name", KINDS)
def test_no_weight_decay_names_norms_and_biases_only(name):
    model = make(name)
    shapes = {key: x.ndim for key, x in model.named_parameters()}
    assert model.no_weight_decay() == {key for key, ndim in shapes.items() if ndim == 1}
    assert "stack.norm.weight" in model.no_weight_decay()
    assert "embedding.weight" not in model.no_weight_decay()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_flops_follow_from_the_sizes(name):
    info = model_info(name, 5000)
    config = info.config
    d, f = config.embed_dim, config.ffn_dim or 4 * config.embed_dim
    matrices = config.num_layers * (4 * d * d + 2 * d * f)
    biases = config.num_layers * (4 * d + f + d)
    norms = config.num_layers * (2 * d + 2 * d + 2 * d + 2 * f) + 2 * d
    assert info.num_params == config.vocab_size * d + matrices + biases + norms
    pairs = config.pattern.attended_pairs(5000, config.num_heads, is_causal=config.is_causal)
    products = 2 * 5000 * (matrices + config.vocab_size * d)
    assert info.flops == products + config.num_layers * pairs * 4 * config.head_dim
