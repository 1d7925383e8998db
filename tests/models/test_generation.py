"""Writing with a causal model."""

import pytest
import torch

from longnet_zoo.factory import create_model
from longnet_zoo.tokenizers import ByteTokenizer

from .families import PATTERN, TEXT, VOCAB_SIZE


@pytest.fixture
def model():
    # A tied head repeats the last token for ever.
    return create_model("longnet_lm_tiny", **TEXT, **PATTERN, tie_embeddings=False).eval()


def prompts(batch=2, seq_len=23):
    return torch.randint(VOCAB_SIZE, (batch, seq_len))


@torch.no_grad()
def written_without_cache(model, prompt, number):
    tokens = prompt
    for _ in range(number):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("chunk_size", [4, 16, 8192])
def test_likeliest_tokens_are_those_of_the_whole_sequence(model, chunk_size):
    prompt = prompts()
    got = model.generate(prompt, max_new_tokens=40, chunk_size=chunk_size)
    assert got.equal(written_without_cache(model, prompt, 40))
    assert got.unique().numel() > 5


@pytest.mark.parametrize("chunk_size", [4, 8192])
def test_prompts_of_different_length_are_written_on_as_each_alone(model, chunk_size):
    prompt, lengths = prompts(3), torch.tensor([23, 9, 16])
    mask = torch.arange(23) >= lengths[:, None]
    got = model.generate(prompt, key_padding_mask=mask, max_new_tokens=20, chunk_size=chunk_size)
    for row, length in enumerate(lengths):
        alone = model.generate(prompt[row : row + 1, :length], max_new_tokens=20)
        assert got[row].equal(alone[0])


def test_a_cache_goes_on_where_it_is(model):
    prompt = prompts()
    whole = model.generate(prompt, max_new_tokens=12)
    cache = model.make_cache(2)
    with torch.no_grad():
        model(prompt[:, :20], cache=cache)
    first = model.generate(prompt[:, 20:], max_new_tokens=5, cache=cache)
    assert cache.lengths == [27, 27]  # all but the last new token
    second = model.generate(first[:, -1:], max_new_tokens=7, cache=cache)
    assert torch.cat([first, second], dim=1).equal(whole)


def test_seeds_repeat_and_differ(model):
    options = {"max_new_tokens": 20, "temperature": 1.5}
    prompt = prompts()
    first, again, other = (model.generate(prompt, seed=x, **options) for x in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    torch.manual_seed(5)
    first, second = (model.generate(prompt, **options) for _ in range(2))
    assert not first.equal(second)
    torch.manual_seed(5)
    assert model.generate(prompt, **options).equal(first)


def test_each_option_reaches_the_draw(model):
    prompt = prompts(1)
    likeliest = model.generate(prompt, max_new_tokens=20)
    for option in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        got = model.generate(prompt, max_new_tokens=20, temperature=3.0, seed=0, **option)
        assert got.equal(likeliest)
    drawn = model.generate(prompt, max_new_tokens=20, temperature=3.0, seed=0)
    assert not drawn.equal(likeliest)
    banned = likeliest.unique().tolist()
    other = model.generate(prompt, max_new_tokens=20, banned_ids=banned)
    assert not torch.isin(other, torch.tensor(banned)).any()


def test_penalty_counts_the_prompt_and_the_answer_but_no_padding(model):
    prompt = torch.arange(30).reshape(1, 30)
    options = {"max_new_tokens": 8, "repetition_penalty": 1e9}
    got = model.generate(prompt, **options)
    # Logits of what was seen are zero or far below, those of some new tokens are positive.
    assert got.unique().numel() == 8
    assert (got >= 30).all()
    mask = torch.arange(30)[None] >= 20
    masked = model.generate(prompt, key_padding_mask=mask, **options)
    assert masked.equal(model.generate(prompt[:, :20], **options))
    assert not masked.equal(got)


def test_rows_stop_by_themselves_and_are_filled_up(model):
    prompt = prompts()
    free = model.generate(prompt, max_new_tokens=30)
    stop = int(free[0, 3])
    assert stop not in free[0, :3]
    end = free[1].tolist().index(stop) if stop in free[1] else 29
    got = model.generate(prompt, max_new_tokens=30, stop_ids=[stop])
    assert got.shape[1] == max(4, end + 1)
    assert got[0, :4].equal(free[0, :4])
    assert (got[0, 4:] == stop).all()
    assert got[1, : end + 1].equal(free[1, : end + 1])
    filled = model.generate(prompt, max_new_tokens=30, stop_ids=[stop], fill_id=60)
    assert (filled[0, 4:] == 60).all()


def test_streamer_sees_every_step(model):
    steps = []
    got = model.generate(prompts(), max_new_tokens=7, streamer=steps.append)
    assert torch.stack(steps, dim=1).equal(got)


def test_stop_strings_may_have_characters_of_several_bytes(model):
    model = create_model("longnet_lm_tiny", **{**TEXT, "vocab_size": 259}, **PATTERN).eval()

    class Emoji:
        def decode(self, ids):
            return "".join("\U0001f600" if len(ids) >= 12 else "." for _ in ids[:3])

    got = model.generate(
        prompts(1), max_new_tokens=30, stop_strings=["\U0001f600" * 3], tokenizer=Emoji()
    )
    assert got.shape[1] == 12


def test_stop_strings_end_a_row():
    model = create_model("longnet_lm_tiny", **{**TEXT, "vocab_size": 259}, **PATTERN).eval()
    prompt = torch.tensor([list(b"hello")])
    # Letters only, so that the text is one of them a token.
    banned = [x for x in range(259) if not chr(x).isalpha() or x > 122]
    options = {"temperature": 2.0, "seed": 0, "banned_ids": banned, "max_new_tokens": 50}
    text = bytes(model.generate(prompt, **options)[0].tolist()).decode()
    string = text[20:23]
    got = model.generate(
        prompt, stop_strings=("never", string), tokenizer=ByteTokenizer(), **options
    )
    assert bytes(got[0].tolist()).decode() == text[: text.index(string) + 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be 1 or more, got 0"),
        ({"max_new_tokens": 1.0}, TypeError, "max_new_tokens must be an integer, got 1.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be 1 or more, got 0"),
        ({"stop_ids": [61]}, ValueError, r"stop_ids must be in \[0, 61\), got \[61\]"),
        ({"banned_ids": [-1]}, ValueError, r"banned_ids must be in \[0, 61\), got \[-1\]"),
        ({"fill_id": 99}, ValueError, r"fill_id must be in \[0, 61\), got \[99\]"),
        ({"stop_ids": 5}, TypeError, "stop_ids must be a sequence of integers, got 5"),
        ({"seed": 1.5}, ValueError, r"seed must be None or an integer in .*, got 1.5"),
        ({"tokens": torch.full((2, 3), 61)}, ValueError, "61"),
        (
            {"key_padding_mask": torch.zeros(2, 22), "repetition_penalty": 2.0},
            TypeError,
            "key_padding_mask must be bool, got torch.float32",
        ),
        ({"stop_strings": "x"}, TypeError, "must be texts that are not empty, got 'x'"),
        ({"stop_strings": ["x"]}, ValueError, r"stop_strings=\('x',\) need tokenizer"),
        ({"stop_strings": ["\udcff"]}, ValueError, "must be of characters that UTF-8 has"),
        (
            {"stop_strings": ["x"], "tokenizer": ByteTokenizer()},
            ValueError,
            "got a batch of 2 without fill_id",
        ),
        ({"top_p": 2.0}, ValueError, r"top_p must be None, or in \(0, 1\], got 2.0"),
        (
            {"key_padding_mask": torch.ones(2, 23, dtype=torch.bool)},
            ValueError,
            r"leave each prompt a token, got none for prompts \[0, 1\]",
        ),
    ],
)
def test_bad_options_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(**{"tokens": prompts(), "max_new_tokens": 3, **options})


def test_models_that_cannot_write_are_refused(model):
    with pytest.raises(ValueError, match="in evaluation mode, got one in training mode"):
        model.train().generate(prompts(), max_new_tokens=3)
    headless = create_model("longnet_lm_tiny", **TEXT, num_outputs=5, tie_embeddings=False)
    with pytest.raises(ValueError, match="got vocab_size=61 and 5 outputs"):
        headless.eval().generate(prompts(), max_new_tokens=3)
