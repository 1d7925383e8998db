"""Generation with our models by Transformers: with and without cache, padded, by beams."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, set_seed

from longnet_zoo.interop.transformers import LongNetCache, LongNetForMaskedLM

from .longnet_toys import make, make_tokens

NEW = 15
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 9, "temperature": 1.7},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"num_return_sequences": 2, "do_sample": True},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
}
# Random models repeat themselves; wide weights make the next token depend on the ones before.
TOY = {"pad_token_id": 0, "eos_token_id": 1, "num_layers": 2}


def make_decoder(**options):
    model = make(**{**TOY, **options}).double()
    model.get_input_embeddings().weight.data.mul_(3.0)
    return model


def generate(model, tokens, **options) -> torch.Tensor:
    set_seed(0)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    return model.generate(tokens, **options)


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_does_not_change_what_is_generated(mode):
    model, tokens = make_decoder(), make_tokens()
    options = {"return_dict_in_generate": True, "output_logits": True, **MODES[mode]}
    plain = generate(model, tokens, use_cache=False, **options)
    cached = generate(model, tokens, use_cache=True, **options)
    assert torch.equal(plain.sequences, cached.sequences)
    torch.testing.assert_close(cached.logits, plain.logits)
    assert plain.past_key_values is None
    assert type(cached.past_key_values) is LongNetCache
    assert len(set(cached.sequences[0, 17:].tolist())) > 3


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_left_padded_rows_generate_as_they_do_alone(mode, use_cache):
    model = make_decoder()
    rows = [make_tokens(1, length)[0] for length in (12, 17, 3)]
    tokens, mask = torch.zeros(3, 17, dtype=torch.int64), torch.zeros(3, 17, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, 17 - len(row) :] = row
        mask[number, 17 - len(row) :] = 1
    options = {"use_cache": use_cache, **MODES[mode]}
    batch = generate(model, tokens, attention_mask=mask, **options)
    for number, row in enumerate(rows):
        alone = generate(model, row[None], **options)
        assert torch.equal(batch[number, 17:], alone[0, len(row) :])
    # The mask is inferred from pad_token_id.
    assert torch.equal(generate(model, tokens, **options), batch)


def test_greedy_takes_the_most_likely_token():
    model, tokens = make_decoder(), make_tokens()
    expected = tokens
    for _ in range(NEW):
        logits = model(expected).logits[:, -1]
        logits[:, 1] = -torch.inf  # min_new_tokens keeps the end away
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, tokens, do_sample=False), expected)


def test_a_sequence_ends_at_its_end_token():
    model, tokens = make_decoder(), make_tokens(3)
    free = generate(model, tokens, do_sample=False)
    ends = int(free[1, 17 + 4])
    out = model.generate(tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=ends)
    at = int((free[1, 17:] == ends).nonzero()[0])
    assert torch.equal(out[1, : 17 + at + 1], free[1, : 17 + at + 1])
    assert bool((out[1, 17 + at + 1 :] == 0).all())


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative", None])
def test_every_kind_of_position_generates_with_a_cache(position):
    model, tokens = make_decoder(position=position, num_kv_heads=1), make_tokens()
    plain = generate(model, tokens, use_cache=False, do_sample=False)
    assert torch.equal(generate(model, tokens, do_sample=False), plain)


def test_embeddings_as_prompt():
    model, tokens = make_decoder(), make_tokens()
    embeds = model.get_input_embeddings()(tokens)
    out = generate(model, None, inputs_embeds=embeds, do_sample=False)
    assert torch.equal(out, generate(model, tokens, do_sample=False)[:, 17:])


def test_the_prompt_is_read_in_chunks():
    model, tokens = make_decoder(), make_tokens()
    tokens[1, :9] = 0  # the first chunks of this row hold nothing but padding
    mask = (tokens != 0).long()
    sizes = []
    model.model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(args[0].shape[1]), with_kwargs=True
    )
    out = generate(model, tokens, attention_mask=mask, do_sample=False, prefill_chunk_size=4)
    assert sizes == [4, 4, 4, 4, 1] + [1] * (NEW - 1)
    assert torch.equal(out, generate(model, tokens, attention_mask=mask, do_sample=False))


def test_a_cache_goes_on_and_branches_off():
    model, tokens = make_decoder(), make_tokens(2, 20)
    expected = generate(model, tokens, do_sample=False)
    cache = LongNetCache()
    assert (cache.batch_size, cache.get_seq_length(), cache.is_initialized) == (-1, 0, False)
    with torch.no_grad():
        model(tokens[:, :13], past_key_values=cache)
    assert (cache.batch_size, cache.get_seq_length(), cache.is_initialized) == (2, 13, True)
    assert cache.get_max_length() == -1
    assert repr(cache) == "LongNetCache(batch_size=2, seq_length=13)"
    branch = copy.deepcopy(cache)
    out = generate(model, tokens, past_key_values=cache, do_sample=False)
    assert torch.equal(out, expected)
    assert cache.get_seq_length() == 20 + NEW - 1
    out = generate(model, tokens, past_key_values=branch, do_sample=False)
    assert torch.equal(out, expected)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)
    assert torch.equal(generate(model, tokens, past_key_values=cache, do_sample=False), expected)


def test_rows_of_a_cache_are_repeated_and_chosen():
    model, tokens = make_decoder(), make_tokens(2, 20)
    cache = LongNetCache()
    cache.batch_repeat_interleave(2)  # nothing to repeat yet
    with torch.no_grad():
        model(tokens[:, :13], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        rows = torch.tensor([0, 0, 1, 1])
        logits = model(tokens[rows, 13:17], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(tokens[rows, :17]).logits[:, 13:])
        cache.batch_select_indices(torch.tensor([3, 0]))
        rows = torch.tensor([1, 0])
        logits = model(tokens[rows, 17:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(tokens[rows]).logits[:, 17:])


def test_memory_of_the_cache_does_not_grow():
    model = make_decoder()
    cache = LongNetCache()
    sizes = []
    with torch.no_grad():
        for _ in range(6):
            model(make_tokens(2, 11), past_key_values=cache)
            sizes.append(cache._kept.num_bytes)
    assert sizes[1:] == sizes[:1] * 5


def test_a_forward_pass_makes_a_cache_only_if_told():
    model, tokens = make_decoder(), make_tokens()
    with torch.no_grad():
        assert model(tokens).past_key_values is None
        outputs = model(tokens, use_cache=True)
    assert outputs.past_key_values.get_seq_length() == 17
    torch.testing.assert_close(outputs.logits, model(tokens).logits)


def test_the_config_says_whether_to_cache(tmp_path):
    make_decoder(use_cache=False).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = generate(model, make_tokens(), do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values is None


def test_what_a_cache_cannot_do_is_refused():
    model, tokens = make_decoder(), make_tokens()
    cache = LongNetCache()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match="got a batch of 1 for a cache of 2"):
            model(tokens[:1], past_key_values=cache)
        with pytest.raises(ValueError, match="got use_cache=False"):
            model(tokens, past_key_values=cache, use_cache=False)
        with pytest.raises(ValueError, match="LongNetCache, got DynamicCache"):
            model(tokens, past_key_values=DynamicCache())
        with pytest.raises(NotImplementedError, match="output_hidden_states=True with a cache"):
            model(tokens, use_cache=True, output_hidden_states=True)
        with pytest.raises(ValueError, match=r"or \(2, 34\) .* 17 columns .* got \(2, 20\)"):
            model(tokens, past_key_values=cache, attention_mask=torch.ones(2, 20))
    with pytest.raises(NotImplementedError, match=r"crop\(-2\)"):
        cache.crop(-2)
    cache.crop(0)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="is_causal=False"):
        make(LongNetForMaskedLM).model(tokens, use_cache=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, tokens, cache_implementation="static")
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, tokens, assistant_model=make_decoder())


def test_hidden_states_of_generation_without_cache():
    model, tokens = make_decoder(), make_tokens()
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "use_cache": False}
    out = generate(model, tokens, do_sample=False, **options)
    assert len(out.hidden_states) == NEW
    assert [state.shape[1] for state in out.hidden_states[2]] == [19, 19, 19]
