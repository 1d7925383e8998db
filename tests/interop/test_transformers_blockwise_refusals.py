"""Models that BPT cannot be put into are refused, and so are options without an effect."""

import copy

import pytest
from torch import nn
from transformers import AutoModel, BloomConfig, GraniteConfig, MixtralConfig, OPTConfig

from longnet_zoo.interop.transformers import patch_blockwise

from .hugging_face_toys import CONFIGS, SIZES, VOCAB, build, draw


def test_chunk_size_must_be_a_number_of_tokens() -> None:
    model = build(CONFIGS["llama"]).train()
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        patch_blockwise(model, chunk_size=0)
    with pytest.raises(TypeError, match=r"an integer, got 2\.5"):
        patch_blockwise(model, chunk_size=2.5)
    with pytest.raises(ValueError, match=r"keep_eval_logits=False needs .* use_chunked_loss=False"):
        patch_blockwise(model, use_chunked_loss=False, keep_eval_logits=False)


def test_a_model_with_a_loss_of_its_own_is_refused() -> None:
    model = build(CONFIGS["llama"]).train()
    model.forward = lambda tokens, labels=None: model.model(tokens)
    patch_blockwise(model)
    with pytest.raises(NotImplementedError, match="by its loss_function, got LlamaForCausalLM"):
        model(draw(2, 9), labels=draw(2, 9))


def test_models_without_what_is_patched_are_refused() -> None:
    with pytest.raises(TypeError, match="model of Hugging Face Transformers, got Linear"):
        patch_blockwise(nn.Linear(2, 2))
    opt = build(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            word_embed_proj_dim=24,
            ffn_dim=40,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )
    with pytest.raises(ValueError, match=r"in OPTForCausalLM layers .*OPTDecoderLayer of .*fc1"):
        patch_blockwise(opt)
    bloom = build(
        BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=1, n_head=4), attention="eager"
    )
    with pytest.raises(NotImplementedError, match=r"BloomMLP of .*'hidden_states', 'residual'"):
        patch_blockwise(bloom)
    mixtral = build(MixtralConfig(num_key_value_heads=2, num_local_experts=2, **SIZES))
    with pytest.raises(NotImplementedError, match=r"got MixtralSparseMoeBlock .*experts"):
        patch_blockwise(mixtral)


def test_losses_that_cannot_be_chunked_are_refused() -> None:
    tokens = labels = draw(2, 9)
    base = AutoModel.from_config(copy.deepcopy(CONFIGS["llama"]))
    with pytest.raises(NotImplementedError, match=r"as output head .*, got NoneType"):
        patch_blockwise(base)
    patch_blockwise(base, use_chunked_loss=False)
    granite = build(GraniteConfig(num_key_value_heads=2, logits_scaling=3.0, **SIZES)).train()
    patch_blockwise(granite)
    with pytest.raises(NotImplementedError, match="scales, caps or casts them"):
        granite(tokens, labels=labels)
    model = patch_blockwise(build(CONFIGS["llama"]).train())
    model.loss_function = lambda **options: 0.0
    with pytest.raises(NotImplementedError, match=r"got Linear and .*lambda"):
        model(tokens, labels=labels)
