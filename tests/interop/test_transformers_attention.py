"""Dilated attention inside models of Transformers, against the models' own dense attention."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    CLIPVisionConfig,
    DataCollatorWithFlattening,
    LlavaConfig,
    PreTrainedModel,
)

from longnet_zoo.interop.transformers import (
    ATTENTION_NAME,
    LongNetForCausalLM,
    patch_blockwise,
    set_pattern,
)
from longnet_zoo.interop.transformers.attention import attend_dilated
from longnet_zoo.interop.transformers.attention_mask import tokens_or_boundaries
from longnet_zoo.models.text_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern

from .hugging_face_toys import (
    CLOSE,
    CONFIGS,
    HEADS,
    NESTED,
    ONE_SEGMENT,
    SIZES,
    UNEVEN,
    VOCAB,
    build_dilated,
    draw,
    every_model,
    left_padded,
    run,
    unpatched,
)
from .longnet_toys import make


def defined_by_counts(
    model: PreTrainedModel,
    tokens: Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = True,
    is_hidden: Tensor | None = None,
) -> Tensor:
    """Runs the dense model: the logarithm of how often a pattern reaches a key is a mask."""
    counts = pattern.mask_counts(tokens.shape[1], HEADS, is_causal=is_causal).double()
    if is_hidden is not None:
        counts = counts.masked_fill(is_hidden, 0.0)
    mask = counts.log().clamp(min=-1e300)[None]
    return run(unpatched(model), tokens, attention_mask=mask)


@every_model
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_one_segment_gives_the_unpatched_model(name: str, padding: str) -> None:
    model = build_dilated(CONFIGS[name], ONE_SEGMENT).float()
    tokens, mask = left_padded([37, 11, 30])
    mask = {"none": torch.ones_like(mask), "left": mask, "right": mask.flip(1)}[padding]
    wanted = run(unpatched(model), tokens, attention_mask=mask)
    got = run(model, tokens, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("pattern", [UNEVEN, NESTED])
def test_branches_follow_their_dense_definition(name: str, pattern: DilatedPattern) -> None:
    model = build_dilated(CONFIGS[name], pattern)
    tokens = draw(2, 43)
    wanted = defined_by_counts(model, tokens, pattern)
    torch.testing.assert_close(run(model, tokens), wanted, **CLOSE)
    assert (run(unpatched(model), tokens) - wanted).abs().max() > 0.1


def test_gradients_follow_the_dense_definition_with_and_without_checkpointing() -> None:
    model = build_dilated(CONFIGS["llama"]).train()
    tokens = draw(2, 29)
    mask = UNEVEN.mask_counts(29, HEADS, is_causal=True).double().log().clamp(min=-1e300)[None]
    dense = unpatched(model)
    cotangent = torch.randn(2, 29, VOCAB, dtype=torch.float64)
    (dense(tokens, attention_mask=mask).logits * cotangent).sum().backward()
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        (model(tokens, use_cache=False).logits * cotangent).sum().backward()
        for got, wanted in zip(model.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad, **CLOSE)


@every_model
def test_later_tokens_move_no_earlier_logit(name: str) -> None:
    model = build_dilated(CONFIGS[name])
    tokens = draw(1, 41)
    before = run(model, tokens)
    for place in (1, 13, 40):
        changed = tokens.clone()
        changed[:, place] = tokens[:, place] % (VOCAB - 1) + 1
        after = run(model, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@every_model
def test_padded_rows_equal_their_sequences_alone(name: str) -> None:
    model = build_dilated(CONFIGS[name])
    lengths = [37, 8, 22, 1]
    tokens, mask = left_padded(lengths)
    got = run(model, tokens, attention_mask=mask)
    for row, length in enumerate(lengths):
        wanted = run(model, tokens[row : row + 1, -length:])[0]
        torch.testing.assert_close(got[row, -length:], wanted, **CLOSE)


def test_padding_on_both_sides_starts_segments_at_the_first_token() -> None:
    model = build_dilated(CONFIGS["llama"])
    tokens = draw(2, 30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :4] = mask[0, 25:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = run(model, tokens, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got[0, 4:25], run(model, tokens[:1, 4:25])[0])
    torch.testing.assert_close(got[1], run(model, tokens[1:])[0])


def test_keys_in_holes_of_a_mask_are_not_seen_and_keep_their_places() -> None:
    model = build_dilated(CONFIGS["neox"])
    tokens = draw(1, 33)
    mask = torch.ones(1, 33, dtype=torch.int64)
    mask[0, [7, 8, 20]] = 0
    got = run(model, tokens, attention_mask=mask)
    wanted = defined_by_counts(model, tokens, UNEVEN, is_hidden=mask[0] == 0)
    real = mask.bool()
    torch.testing.assert_close(got[real], wanted[real])


@every_model
@pytest.mark.parametrize("how", ["positions", "boundaries", "with a cache"])
def test_packed_sequences_equal_themselves_alone(name: str, how: str) -> None:
    model = build_dilated(CONFIGS[name])
    lengths = [9, 1, 23, 14]
    sequences = [draw(length).tolist() for length in lengths]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=how == "boundaries")
    batch = collate([{"input_ids": sequence} for sequence in sequences])
    batch.pop("labels")
    # Without a cache the mask tells of packing, with one the positions that the model hands on.
    got = run(model, batch.pop("input_ids"), use_cache=how == "with a cache", **batch)
    for part, sequence in zip(got[0].split(lengths), sequences, strict=True):
        torch.testing.assert_close(part, run(model, torch.tensor([sequence]))[0])


def test_rows_of_a_batch_may_be_packed_each() -> None:
    model = build_dilated(CONFIGS["llama"])
    tokens = draw(2, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    positions = torch.cat([positions, torch.arange(20)[None]])
    got = run(model, tokens, position_ids=positions, use_cache=False)
    torch.testing.assert_close(got[0, :12], run(model, tokens[:1, :12])[0])
    torch.testing.assert_close(got[0, 12:], run(model, tokens[:1, 12:])[0])
    torch.testing.assert_close(got[1], run(model, tokens[1:])[0])


def test_bidirectional_models_attend_in_both_directions() -> None:
    config = BertConfig(**SIZES)
    model = AutoModel.from_config(config, attn_implementation=ATTENTION_NAME).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    set_pattern(model, UNEVEN)
    tokens = draw(2, 29)
    mask = torch.ones(2, 29, dtype=torch.int64)
    mask[1, 20:] = 0
    counts = UNEVEN.mask_counts(29, HEADS).double().log().clamp(min=-1e300)[None]
    with torch.no_grad():
        got = model(tokens, attention_mask=mask).last_hidden_state
        alone = model(tokens[1:, :20]).last_hidden_state[0]
        wanted = unpatched(model)(tokens[:1], attention_mask=counts).last_hidden_state[0]
    torch.testing.assert_close(got[0], wanted)
    torch.testing.assert_close(got[1, :20], alone)


def test_causal_models_can_be_asked_for_both_directions() -> None:
    model = build_dilated(CONFIGS["llama"])
    tokens = draw(1, 23)
    wanted = defined_by_counts(model, tokens, UNEVEN, is_causal=False)
    torch.testing.assert_close(run(model, tokens, is_causal=False, use_cache=False), wanted)


def test_pattern_is_saved_and_loaded_with_the_model(tmp_path) -> None:
    pattern = DilatedPattern(
        segment_lengths=(7, 21), dilation_rates=(1, 2), head_offset="block", padded_keys="zero"
    )
    model = build_dilated(CONFIGS["qwen2"], pattern)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=ATTENTION_NAME, dtype=torch.float64
    )
    tokens = draw(1, 30)
    torch.testing.assert_close(run(loaded, tokens), run(model, tokens))
    torch.testing.assert_close(run(loaded, tokens), defined_by_counts(model, tokens, pattern))


def test_a_model_without_a_pattern_has_that_of_the_paper() -> None:
    model = build_dilated(CONFIGS["llama"], None)
    tokens = draw(1, 50)
    paper = DilatedPattern(
        segment_lengths=PAPER_SEGMENT_LENGTHS, dilation_rates=PAPER_DILATION_RATES
    )
    torch.testing.assert_close(run(model, tokens), defined_by_counts(model, tokens, paper))


def test_implementation_can_be_set_and_a_later_pattern_counts() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    tokens = draw(1, 40)
    dense = run(model, tokens)
    model.set_attn_implementation(ATTENTION_NAME)
    torch.testing.assert_close(run(set_pattern(model, ONE_SEGMENT), tokens), dense)
    assert not torch.allclose(run(set_pattern(model, NESTED), tokens), dense, atol=1e-3)
    assert set_pattern(model, NESTED) is model


def test_the_text_model_of_several_modalities_gets_the_pattern() -> None:
    image = CLIPVisionConfig(hidden_size=24, intermediate_size=30, num_hidden_layers=1)
    config = LlavaConfig(text_config=copy.deepcopy(CONFIGS["llama"]), vision_config=image)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=ATTENTION_NAME)
    model = set_pattern(model, UNEVEN).eval()
    assert model.config.text_config.longnet_pattern["segment_lengths"] == [5, 13, 31]
    tokens = draw(1, 40)
    before = run(model, tokens)
    assert not torch.allclose(run(set_pattern(model, ONE_SEGMENT), tokens), before, atol=1e-4)


# PEFT 0.21 asks Transformers by a name that it has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_wrapped_by_peft_takes_a_pattern() -> None:
    from peft import LoraConfig, get_peft_model

    model = build_dilated(CONFIGS["llama"], None)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert set_pattern(wrapped, UNEVEN) is wrapped
    tokens = draw(1, 30)
    torch.testing.assert_close(run(wrapped, tokens), defined_by_counts(model, tokens, UNEVEN))


def test_dropout_is_on_in_training_alone() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.4
    model = build_dilated(config)
    tokens = draw(1, 30)
    assert torch.equal(run(model, tokens), run(model, tokens))
    model.train()
    assert not torch.equal(run(model, tokens), run(model, tokens))


def test_autocast_gives_attention_one_dtype() -> None:
    model = build_dilated(CONFIGS["llama"], ONE_SEGMENT).float()
    tokens = draw(2, 30)
    exact = run(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        # Without a cache, which would give keys and values one dtype.
        got = run(model, tokens, use_cache=False)
        dense = run(unpatched(model), tokens, use_cache=False)
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 2 * (dense - exact).abs().max()


def test_values_may_have_fewer_channels_than_keys() -> None:
    q, k, v = torch.randn(2, 6, 20, 12), torch.randn(2, 3, 20, 12), torch.randn(2, 3, 20, 7)
    module = build_dilated(CONFIGS["llama"]).model.layers[0].self_attn
    got, weights = attend_dilated(module, q, k, v, None, scaling=0.3)
    wide = torch.nn.functional.pad(v, (0, 5))
    wanted = dilated_attention(
        *(x.transpose(1, 2) for x in (q, k, wide)), UNEVEN, is_causal=True, scale=0.3
    )
    torch.testing.assert_close(got, wanted[..., :7])
    last_row, _ = attend_dilated(module, q[:, :, -1:], k, v, None, scaling=0.3)
    torch.testing.assert_close(last_row, got[:, -1:])
    assert weights is None
    assert got.is_contiguous()


def test_a_window_of_zero_is_none():
    """As Qwen2-MoE has it."""
    module, heads = torch.nn.Module(), torch.randn(1, 2, 9, 4)
    module.is_causal = True
    out, _ = attend_dilated(module, heads, heads, heads, None, sliding_window=0)
    expected, _ = attend_dilated(module, heads, heads, heads, None)
    assert torch.equal(out, expected)
    options = {"batch_size": 1, "q_length": 9, "kv_length": 9, "local_size": 0}
    assert tokens_or_boundaries(**options) is None


def test_our_own_models_have_a_pattern_of_their_own():
    model = make(LongNetForCausalLM)
    with pytest.raises(ValueError, match=r"got another for a model with segment_lengths=\(5, 11\)"):
        set_pattern(model, NESTED)
    with pytest.raises(NotImplementedError, match="Pass use_chunked_loss=False"):
        patch_blockwise(model)
