"""What dilated attention refuses in models of Transformers, and that it makes no mask of pairs."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CodeGenConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from longnet_zoo.interop.transformers import ATTENTION_NAME, set_pattern
from longnet_zoo.interop.transformers.attention import attend_dilated
from longnet_zoo.interop.transformers.attention_mask import tokens_or_boundaries
from longnet_zoo.ops.pattern import DilatedPattern

from .hugging_face_toys import (
    CONFIGS,
    ONE_SEGMENT,
    SIZES,
    UNEVEN,
    build_dilated,
    draw,
    run,
    unpatched,
)


@pytest.fixture
def model() -> PreTrainedModel:
    return build_dilated(CONFIGS["llama"])


@pytest.fixture
def layer(model: PreTrainedModel) -> nn.Module:
    return model.model.layers[0].self_attn


def draw_qkv(*, num_queries: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind(0)
    return q[:, :, -num_queries:], k, v


def test_no_mask_of_pairs_is_made(model: PreTrainedModel) -> None:
    # One of a million tokens would take a terabyte.
    embeds = torch.empty(1, 1, 1).expand(2, 1_000_000, 1)
    tokens = torch.ones(2, 1_000_000, dtype=torch.int64)
    assert create_causal_mask(model.config, embeds, None, None) is None
    assert create_causal_mask(model.config, embeds, tokens, None) is None
    tokens[1, :7] = 0
    made = create_causal_mask(model.config, embeds, tokens, None)
    assert torch.equal(made, tokens.bool())
    positions = torch.arange(1_000_000) % 400_000
    made = create_causal_mask(model.config, embeds, None, None, positions[None])
    bounds = [0, 400_000, 800_000, 1_000_000, 1_400_000, 1_800_000, 2_000_000]
    assert made.tolist() == bounds
    assert made.dtype == torch.int32
    assert create_bidirectional_mask(model.config, embeds, None) is None


def test_a_window_as_long_as_the_sequence_has_no_effect_and_a_shorter_one_is_refused() -> None:
    config = copy.deepcopy(CONFIGS["mistral"])
    config.sliding_window = 24
    model = build_dilated(config, ONE_SEGMENT)
    tokens = draw(1, 24)
    torch.testing.assert_close(run(model, tokens), run(unpatched(model), tokens))
    with pytest.raises(ValueError, match=r"a window of 24 and 25 tokens\..*sliding_window = None"):
        run(model, draw(1, 25))
    # With a cache, which forgets what the window has left.
    with pytest.raises(ValueError, match="a window of 24 and 25 tokens"):
        model.generate(tokens, max_new_tokens=3)
    layer = model.model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 1, 9, 8).unbind(0)
    with pytest.raises(ValueError, match="a window of 8 and 9 tokens"):
        attend_dilated(layer, q, k, v, None, sliding_window=8)


def test_windows_of_single_layers_are_refused_too() -> None:
    model = build_dilated(
        Gemma3TextConfig(num_key_value_heads=2, head_dim=8, sliding_window=16, **SIZES)
    )
    run(model, draw(1, 16))
    with pytest.raises(ValueError, match="a window of 16 and 17 tokens"):
        run(model, draw(1, 17))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "output_attentions"])
def test_options_without_a_meaning_are_refused(layer: nn.Module, option: str) -> None:
    q, k, v = draw_qkv()
    for off in (None, False):
        attend_dilated(layer, q, k, v, None, **{option: off})
    value = True if option == "output_attentions" else torch.ones(2)
    with pytest.raises(NotImplementedError, match=f"takes no {option}, got it from LlamaAttention"):
        attend_dilated(layer, q, k, v, None, **{option: value})


def test_a_model_with_softcap_is_refused() -> None:
    model = build_dilated(Gemma2Config(num_key_value_heads=2, head_dim=8, **SIZES))
    with pytest.raises(NotImplementedError, match="takes no softcap, got it from Gemma2Attention"):
        run(model, draw(1, 9))


@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (1, 9, 9)])
def test_masks_of_pairs_are_refused(shape: tuple[int, ...]) -> None:
    layer = build_dilated(CONFIGS["llama"]).model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind(0)
    with pytest.raises(NotImplementedError, match=rf"shape \({shape[0]}, .*9\) and torch.float32"):
        attend_dilated(layer, q, k, v, torch.zeros(shape))
    if len(shape) == 4:
        with pytest.raises(NotImplementedError, match=r"no mask of pairs.*\(1, 1, 9, 9\)"):
            run(build_dilated(CONFIGS["llama"]), draw(1, 9), attention_mask=torch.zeros(shape))


def test_models_with_an_attention_of_their_own_are_refused() -> None:
    # Its mask would be None, and it would see the future.
    model = AutoModelForCausalLM.from_config(
        CodeGenConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
        attn_implementation=ATTENTION_NAME,
    )
    with pytest.raises(NotImplementedError, match=r"attention interface .*, got CodeGenModel"):
        run(model, draw(1, 9))


def test_cross_attention_is_refused(layer: nn.Module) -> None:
    layer.config.add_cross_attention = True
    with pytest.raises(NotImplementedError, match=r"LlamaConfig\.add_cross_attention=True"):
        attend_dilated(layer, *draw_qkv(), None)
    config = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
    t5 = AutoModel.from_config(config, attn_implementation=ATTENTION_NAME)
    with pytest.raises(NotImplementedError, match="position_bias, got it from T5Attention"):
        t5(input_ids=draw(1, 9), decoder_input_ids=draw(1, 5))
    config = BertConfig(**SIZES)
    config._attn_implementation = ATTENTION_NAME
    queries, keys = torch.zeros(1, 5, 48), torch.zeros(1, 9, 48)
    with pytest.raises(NotImplementedError, match="5 queries after 0 tokens and 9 keys"):
        create_bidirectional_mask(config, queries, None, encoder_hidden_states=keys)


def test_bidirectional_attention_takes_no_cache(layer: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match=r"got 2 queries and 9 keys\..*use_cache=False"):
        attend_dilated(layer, *draw_qkv(num_queries=2), None, is_causal=False)


def test_functions_on_top_of_the_mask_are_refused(model: PreTrainedModel) -> None:
    embeds = torch.zeros(1, 12, 48)

    def prefix(batch, head, query, key):
        return key < 4

    with pytest.raises(NotImplementedError, match=r"no function of the model .* for 12 tokens"):
        create_causal_mask(model.config, embeds, None, None, or_mask_function=prefix)
    blocks = torch.tensor([[-1] * 5 + [0] * 3 + [-1] * 4])
    with pytest.raises(NotImplementedError, match="some of 12 tokens see otherwise"):
        create_causal_mask(model.config, embeds, None, None, block_sequence_ids=blocks)
    alone = torch.full((1, 12), -1)
    made = create_causal_mask(model.config, embeds, None, None, block_sequence_ids=alone)
    assert made is None


@pytest.mark.parametrize(
    "sees",
    [
        lambda batch, head, query, key: (key <= query) & (key > query - 4),
        lambda batch, head, query, key: (key < query) | ((key == 0) & (query == 0)),
        lambda batch, head, query, key: (key <= query) & ((key // 3 == query // 3) | (key < 6)),
        lambda batch, head, query, key: (key <= query) | (key < 5),
        lambda batch, head, query, key: (key <= query) & (key // 4 == query // 4) | (key == 3),
    ],
)
def test_other_ways_to_see_are_refused(sees) -> None:
    options = {"batch_size": 2, "q_length": 12, "kv_length": 12, "mask_function": sees}
    with pytest.raises(NotImplementedError, match="some of 12 tokens see otherwise"):
        tokens_or_boundaries(**options)


def test_packing_and_dropped_keys_are_refused_where_a_cache_is_filled() -> None:
    options = {"batch_size": 1, "q_length": 4, "kv_length": 10, "q_offset": 6}
    with pytest.raises(NotImplementedError, match="some of 10 tokens see otherwise"):
        tokens_or_boundaries(
            mask_function=lambda batch, head, query, key: (key <= query) & (key // 8 == query // 8),
            **options,
        )
    with pytest.raises(NotImplementedError, match="4 queries after 6 tokens and 7 keys"):
        tokens_or_boundaries(kv_offset=3, **options | {"kv_length": 7})
    assert tokens_or_boundaries(**options) is None


def test_a_mask_must_cover_the_cache(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    run(model, draw(1, 7), past_key_values=cache)
    mask = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"that are read, 9, got \(1, 2\)"):
        run(model, draw(1, 2), past_key_values=cache, attention_mask=mask)


def test_boundaries_must_fit(model: PreTrainedModel, layer: nn.Module) -> None:
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    qkv = draw_qkv()
    attend_dilated(layer, *qkv, None, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q=\[0, 4, 9\], cu_seq_lens_k=\[0, 5, 10\]"):
        attend_dilated(layer, *qkv, None, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds // 4 * 5)
    with pytest.raises(ValueError, match="for 2 queries and 9 keys"):
        attend_dilated(layer, *draw_qkv(num_queries=2), None, cu_seq_lens_q=bounds)
    tokens = torch.arange(9)[None] < 7
    with pytest.raises(ValueError, match="2 places of padding"):
        attend_dilated(layer, *qkv, tokens, cu_seq_lens_q=bounds)


def test_a_pattern_needs_a_model_with_dilated_attention(model: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="must be a DilatedPattern, got tuple"):
        set_pattern(model, (64, 1))
    with pytest.raises(TypeError, match="model of Hugging Face Transformers, got Linear"):
        set_pattern(nn.Linear(2, 2), UNEVEN)
    with pytest.raises(ValueError, match="attention is 'longnet_dilated', got 'sdpa'"):
        set_pattern(unpatched(model), UNEVEN)
    shard = DilatedPattern(segment_lengths=(8,), dilation_rates=(2,), first_head=2, total_heads=4)
    with pytest.raises(ValueError, match="got first_head=2 and total_heads=4"):
        set_pattern(model, shard)
