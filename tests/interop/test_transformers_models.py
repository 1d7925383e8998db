"""Our models under Transformers' conventions: conversion, initial values, saving, embeddings."""

import logging
import math

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

import longnet_zoo as lz
from longnet_zoo.interop.transformers import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetModel,
)

from .longnet_toys import CLASSES, HEADS, SIZES, make, make_tokens, output_of


@pytest.mark.parametrize("norm", ["sub_ln", "deepnorm"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["longnet_lm_tiny", "longnet_mlm_tiny"])
def test_a_model_of_ours_becomes_theirs_and_back(name, tied, norm):
    sizes = {**SIZES, "num_layers": 2, "norm": norm, "tie_embeddings": tied}
    ours = lz.create_model(name, **sizes).to(torch.float64).train()
    model_class = LongNetForCausalLM if name == "longnet_lm_tiny" else LongNetForMaskedLM
    theirs = model_class.from_zoo(ours, pad_token_id=0)
    assert (theirs.dtype, theirs.training) == (torch.float64, True)
    assert (theirs.config.pad_token_id, theirs.config.norm) == (0, norm)
    tokens = make_tokens()
    expected = ours.eval()(tokens)
    again = theirs.to_zoo()
    assert again.training
    assert again.config == ours.config
    torch.testing.assert_close(theirs.eval()(tokens).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(again.eval()(tokens), expected, rtol=0, atol=0)
    for parameter in theirs.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=0)
    torch.testing.assert_close(again(tokens), expected, rtol=0, atol=0)


def test_the_base_model_converts_without_a_head():
    ours = lz.create_model("longnet_lm_tiny", **SIZES).eval()
    theirs = LongNetModel.from_zoo(ours)
    assert not theirs.training
    tokens = make_tokens()
    expected = ours.forward_features(tokens)
    torch.testing.assert_close(theirs(tokens).last_hidden_state, expected, rtol=0, atol=0)
    assert theirs.to_zoo().config.num_outputs == 0
    torch.testing.assert_close(theirs.to_zoo()(tokens), expected, rtol=0, atol=0)


def test_conversion_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="LongNetLM or LongNetMLM, got LongViT"):
        LongNetModel.from_zoo(lz.create_model("longvit_tiny_patch8_64"))
    ours = lz.create_model("longnet_lm_tiny", **SIZES)
    with pytest.raises(ValueError, match="LongNetForMaskedLM needs is_causal=False"):
        LongNetForMaskedLM.from_zoo(ours)
    ours.reset_classifier(7)
    with pytest.raises(ValueError, match="needs a model with vocab_size=61 logits, got one with 7"):
        LongNetForCausalLM.from_zoo(ours)


@pytest.mark.parametrize("model_class", HEADS)
def test_a_head_refuses_a_model_of_the_other_direction(model_class):
    wrong = model_class is LongNetForMaskedLM
    with pytest.raises(ValueError, match=f"{model_class.__name__} needs is_causal={not wrong}"):
        make(model_class, is_causal=wrong)


def test_auto_classes_know_the_models():
    config = LongNetConfig(**SIZES)
    assert type(AutoModel.from_config(config)) is LongNetModel
    assert type(AutoModelForCausalLM.from_config(config)) is LongNetForCausalLM
    config = LongNetConfig(**SIZES, is_causal=False)
    assert type(AutoModelForMaskedLM.from_config(config)) is LongNetForMaskedLM


def spread(model: PreTrainedModel) -> dict[str, float]:
    return {name: float(weight.std()) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("position", ["xpos", "relative"])
@pytest.mark.parametrize("name", ["longnet_lm_tiny", "longnet_mlm_tiny"])
def test_initial_values_are_those_of_our_models(name, position, tmp_path):
    sizes = {**SIZES, "embed_dim": 96, "vocab_size": 301, "position": position}
    ours = lz.create_model(name, **sizes, tie_embeddings=False)
    model_class = LongNetForCausalLM if name == "longnet_lm_tiny" else LongNetForMaskedLM
    theirs = make(model_class, **sizes, tie_word_embeddings=False)
    expected = spread(ours)
    assert spread(theirs.to_zoo()) == pytest.approx(expected, rel=0.2, abs=1e-6)

    # Loading a checkpoint that lacks most weights draws them as well.
    kept = {"lm_head.weight": theirs.lm_head.weight.data.fill_(7.0)}
    theirs.save_pretrained(tmp_path, state_dict=kept)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == len(expected) - 1
    expected["head.weight"] = 0.0
    assert spread(loaded.to_zoo()) == pytest.approx(expected, rel=0.2, abs=1e-6)
    blocks = loaded.model.network.stack.blocks
    values = torch.stack([block.attention.v_proj.weight.detach() for block in blocks])
    # Magneto's gain for three layers of a decoder or encoder.
    gain = math.sqrt(math.log(2 * 3))
    assert float(values.std()) == pytest.approx(gain * 96**-0.5, rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_class", CLASSES)
def test_saved_models_load_with_every_key(model_class, tied, tmp_path):
    model, tokens = make(model_class, tie_word_embeddings=tied), make_tokens()
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    torch.testing.assert_close(output_of(loaded, tokens), output_of(model, tokens), rtol=0, atol=0)
    assert loaded.config.to_zoo() == model.config.to_zoo()


def test_large_models_are_saved_in_parts(tmp_path):
    model, tokens = make(), make_tokens()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output_of(loaded, tokens), output_of(model, tokens), rtol=0, atol=0)


@pytest.mark.parametrize("model_class", HEADS)
def test_base_and_heads_load_each_other(model_class, tmp_path):
    model, tokens = make(model_class), make_tokens()
    model.save_pretrained(tmp_path / "head")
    base, info = LongNetModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    features = output_of(model.model, tokens)
    torch.testing.assert_close(output_of(base, tokens), features, rtol=0, atol=0)
    base.save_pretrained(tmp_path / "base")
    again = model_class.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(output_of(again, tokens), output_of(model, tokens), rtol=0, atol=0)


def test_models_load_in_the_dtype_asked_for(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.bfloat16}
    logits = output_of(loaded, make_tokens())
    assert logits.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "half")
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_tied_weights_are_one(tmp_path):
    tied, untied = make(), make(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    assert untied.num_parameters() - tied.num_parameters() == 61 * 24
    tied.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


# --- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_class", HEADS)
def test_the_vocabulary_grows_and_shrinks(model_class, tied, tmp_path):
    model, tokens = make(model_class, tie_word_embeddings=tied), make_tokens()
    before = output_of(model, tokens)
    model.resize_token_embeddings(64, mean_resizing=False)
    assert (model.config.vocab_size, model.lm_head.out_features) == (64, 64)
    assert model.model.network.config.vocab_size == 64
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    after = output_of(model, tokens)
    torch.testing.assert_close(after[..., :61], before, rtol=0, atol=1e-6)
    new = model.get_input_embeddings().weight[61:]
    assert float(new.detach().std()) == pytest.approx(24**-0.5, rel=0.3)
    output_of(model, torch.full((1, 3), 63))
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    torch.testing.assert_close(output_of(loaded, tokens), after, rtol=0, atol=0)
    assert model.to_zoo().config.vocab_size == 64
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="50"):
        output_of(model, torch.full((1, 3), 60))


def test_embeddings_can_be_replaced():
    model = make(tie_word_embeddings=False)
    new_in, new_out = torch.nn.Embedding(9, 24), torch.nn.Linear(24, 9, bias=False)
    model.set_input_embeddings(new_in)
    model.set_output_embeddings(new_out)
    assert model.get_input_embeddings() is new_in
    assert model.get_output_embeddings() is new_out
    assert output_of(model, torch.full((1, 4), 8)).shape == (1, 4, 9)


@pytest.mark.parametrize("model_class", CLASSES)
def test_embeddings_instead_of_tokens(model_class):
    model, tokens = make(model_class, scale_embedding=True), make_tokens()
    embeds = model.get_input_embeddings()(tokens)
    out = output_of(model, None, inputs_embeds=embeds)
    torch.testing.assert_close(out, output_of(model, tokens), rtol=0, atol=0)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds, got both"):
        model(tokens, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds, got neither"):
        model()


def test_what_transformers_reads_of_a_class():
    model = make()
    # Several devices: a block goes to one of them, and the cache stays where it is.
    assert {"TransformerBlock"} == model._no_split_modules
    assert "TransformerBlock" in {type(module).__name__ for module in model.modules()}
    assert {"past_key_values"} == model._skip_keys_device_placement
    assert not model.supports_context_parallel
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        LongNetForCausalLM._from_config(model.config, attn_implementation="sdpa")


def test_no_message_of_transformers_while_loading(tmp_path, caplog):
    make().save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
