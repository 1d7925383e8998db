"""What is refused as a base, and how 4 bits are asked for."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from longnet_zoo import DilatedPattern
from longnet_zoo.interop.transformers import ATTENTION_NAME, LongNetConfig, LongNetForCausalLM
from longnet_zoo.tokenizers import ByteTokenizer
from recipes.finetune_lora_base import load_base
from recipes.finetune_lora_model import AdaptedLM, LoraOptions, token_losses
from tests.recipes.finetune_runs import PATTERN, TOY, make_task, save_toy

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(LlamaForCausalLM, LlamaConfig(**TOY), tmp_path_factory.mktemp("toy"))


# Bases --------------------------------------------------------------------------------------------


def test_options_and_pattern_reach_the_model(toy):
    positions = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
    options = {"dtype": "bfloat16", "rope_parameters": positions, "max_position_embeddings": 256}
    model = load_base(str(toy), options=options, pattern=DilatedPattern(**PATTERN))
    assert model.dtype == torch.bfloat16
    assert positions.items() <= model.config.rope_parameters.items()
    assert model.config.max_position_embeddings == 256
    assert model.config._attn_implementation == ATTENTION_NAME
    assert model.config.longnet_pattern["segment_lengths"] == PATTERN["segment_lengths"]


def test_feed_forward_networks_run_in_chunks(toy):
    seen = []
    model = load_base(str(toy), chunk_size=5)
    gate = model.model.layers[0].mlp.gate_proj
    gate.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 0].numel()))
    AdaptedLM(model, lora=LoraOptions(rank=1)).loss(*torch.zeros(2, 1, 12).long())
    assert max(seen[-3:]) == 5


def test_our_own_models_are_bases_too(tmp_path):
    config = LongNetConfig(vocab_size=259, embed_dim=16, num_layers=1, num_heads=2, ffn_dim=24)
    task = make_task(save_toy(LongNetForCausalLM, config, tmp_path))
    tokens = torch.randint(256, (1, 20))
    task.model.loss(tokens, tokens).backward()
    assert sum(value.grad is not None for value in task.parameters()) > 0


def test_a_base_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"a base must be the folder .* got '.*nowhere'"):
        load_base(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"got model_name=None\. Pass a folder"):
        make_task(None, model_name=None)


def test_unknown_options_are_refused(toy):
    with pytest.raises(ValueError, match=r"\{'hiden_size': 3\}: .*'hiden_size'"):
        load_base(str(toy), options={"hiden_size": 3})


def test_a_base_without_a_head_is_refused(tmp_path):
    save_toy(LlamaModel, LlamaConfig(**TOY), tmp_path)
    with pytest.raises(ValueError, match=r"has none for lm_head.weight of LlamaForCausalLM"):
        load_base(str(tmp_path))


def test_what_is_no_language_model_is_refused(tmp_path):
    save_toy(ViTModel, ViTConfig(**SMALL, intermediate_size=16), tmp_path)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*ViTConfig"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float99"}, r"and \{'dtype': 'float99'\}"),
        ({"num_attention_heads": 3}, "'num_attention_heads': 3"),
        ({"subfolder": "model"}, "got model.model_options.subfolder='model'"),
    ],
)
def test_wrong_options_of_the_base_are_refused(toy, options, message):
    with pytest.raises(ValueError, match=message):
        load_base(str(toy), options=options)


def test_our_own_models_have_a_pattern_and_no_documents(tmp_path):
    config = LongNetConfig(vocab_size=50, embed_dim=16, num_layers=1, num_heads=2)
    save_toy(LongNetForCausalLM, config, tmp_path)
    with pytest.raises(ValueError, match="pattern of its own, got another for a model with"):
        load_base(str(tmp_path), pattern=DilatedPattern(**PATTERN))
    tokens, bounds = torch.arange(12)[None], torch.tensor([0, 5, 12])
    with pytest.raises(NotImplementedError, match="with position_ids, got a LongNetForCausalLM"):
        token_losses(
            load_base(str(tmp_path)), tokens, tokens, is_head_linear=True, cu_seqlens=bounds
        )


def test_an_encoder_which_sees_the_next_token_is_refused(tmp_path):
    config = BertConfig(**SMALL, intermediate_size=16, vocab_size=50, initializer_range=0.5)
    save_toy(BertForMaskedLM, config, tmp_path)
    with pytest.raises(ValueError, match=r"BertLMHeadModel\) change by \d"):
        load_base(str(tmp_path))
    assert load_base(str(tmp_path), options={"is_decoder": True})


def test_a_pattern_needs_its_attention(toy):
    options = {"attn_implementation": "eager"}
    with pytest.raises(ValueError, match="='longnet_dilated', got 'eager'"):
        load_base(str(toy), options=options, pattern=DilatedPattern(**PATTERN))


# 4 bits -------------------------------------------------------------------------------------------


def test_4_bits_without_bitsandbytes_is_one_error(toy, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="quantization='4bit' needs the package bitsandbytes"):
        load_base(str(toy), quantization="4bit")


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
def test_4_bits_keep_linear_layers_in_4_bits_and_train_adapters(tmp_path):
    # bitsandbytes takes rows in blocks of 64.
    config = LlamaConfig(**TOY | {"hidden_size": 64, "intermediate_size": 128})
    base = save_toy(LlamaForCausalLM, config, tmp_path)
    task = make_task(base, quantization="4bit", pattern=DilatedPattern(**PATTERN))
    layer = task.model.base.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    tokens = torch.randint(256, (1, 32))
    losses = []
    optimizer = torch.optim.Adam([x for x in task.parameters() if x.requires_grad], lr=1e-2)
    for _ in range(8):
        with torch.no_grad():
            # As in a validation between two steps.
            assert task.eval().model.loss(tokens, tokens).isfinite()
        task.train()
        losses.append(task.model.loss(tokens, tokens))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all("lora_" in name for name in task.state_dict())


# Adapters and data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rank": 0}, "rank must be 1 or more, got rank=0"),
        ({"alpha": -1}, "alpha must be 1 or more, got alpha=-1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got dropout=1.0"),
    ],
)
def test_options_of_adapters_have_ranges(option, message):
    with pytest.raises(ValueError, match=message):
        LoraOptions(**option)


def test_layers_of_gpt2_can_be_named(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=259, n_positions=32)
    base = load_base(str(save_toy(GPT2LMHeadModel, config, tmp_path)))
    model = AdaptedLM(base, lora=LoraOptions(target_modules=("c_attn",)))
    assert model.num_params(trainable_only=True) == 16 * (16 + 48)


@pytest.mark.parametrize("names", [("q_proj", "wrong"), (), "wrong"])
def test_names_that_match_no_layer_are_refused(toy, names):
    with pytest.raises(ValueError, match=r"match nothing\. Llama.* down_proj, embed_tokens"):
        AdaptedLM(load_base(str(toy)), lora=LoraOptions(target_modules=names))


def test_padded_rows_are_refused(toy):
    tokens, mask = torch.zeros(1, 7).long(), torch.zeros(1, 7, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"key_padding_mask of shape \(1, 7\)"):
        make_task(toy).model.loss(tokens, tokens, key_padding_mask=mask)


@pytest.mark.parametrize("vocab_size", [200, 1200])
def test_another_tokenizer_than_that_of_the_base_is_refused(tmp_path, vocab_size):
    save_toy(LlamaForCausalLM, LlamaConfig(**TOY | {"vocab_size": vocab_size}), tmp_path)
    with pytest.raises(ValueError, match=f"with {vocab_size:,} ids and a ByteTokenizer with 259"):
        make_task(tmp_path).attach_tokenizer(ByteTokenizer())


def test_strategies_that_split_models_are_refused(toy):
    task = make_task(toy)
    task._trainer = SimpleNamespace(strategy=SimpleNamespace())
    with pytest.raises(ValueError, match=r"got trainer\.strategy=SimpleNamespace"):
        task.setup("fit")
