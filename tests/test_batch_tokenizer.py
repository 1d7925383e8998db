"""Texts to padded batches, as open_clip's users expect them."""

import warnings

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from longnet_zoo.batch_tokenizer import BatchTokenizer, get_tokenizer
from longnet_zoo.models import LongNetCLIP
from longnet_zoo.tokenizers import ByteTokenizer, load_tokenizer
from tests.models.small_clip import make

TEXTS = ["a cat", "", "naïve café 🙂"]


@pytest.fixture
def tokenizer():
    return get_tokenizer("longnet_clip_tiny")


@pytest.fixture
def word_file(tmp_path):
    """A vocabulary with an end token, without one for padding."""
    words = models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "cat": 3, "dog": 4}, unk_token="<unk>")
    words = tokenizers.Tokenizer(words)
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<unk>", "</s>"])
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    return path


def test_rows_are_bytes_and_an_end_padded_to_the_longest(tokenizer):
    tokens = tokenizer(TEXTS)
    rows = [[*text.encode(), 256] for text in TEXTS]
    longest = max(map(len, rows))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [row + [258] * (longest - len(row)) for row in rows]


def test_one_text_is_a_batch_of_one(tokenizer):
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
    assert tokenizer("").tolist() == [[256]]


def test_a_context_length_in_the_call_is_the_width(tokenizer):
    tokens = tokenizer(TEXTS, 77)
    assert tokens.shape == (3, 77)
    assert torch.equal(tokens[:, : tokenizer(TEXTS).shape[1]], tokenizer(TEXTS))
    assert (tokens[:, -1] == 258).all()


def test_texts_come_back(tokenizer):
    assert tokenizer.decode(tokenizer(TEXTS, 77)) == TEXTS
    assert tokenizer.decode(tokenizer(TEXTS)[0]) == "a cat"


def test_the_model_gives_the_longest_text(tokenizer):
    assert tokenizer.context_length == 8192
    assert tokenizer("x" * 8191).shape == (1, 8192)
    assert tokenizer.num_truncated == 0
    assert get_tokenizer("longnet_clip_tiny", context_length=5).context_length == 5


def test_long_texts_are_cut_counted_and_warned_of_once():
    tokenizer = get_tokenizer("longnet_clip_tiny", context_length=4)
    message = r"2 of 3 texts are longer than context_length=4 tokens, the longest has 7 with"
    with pytest.warns(UserWarning, match=message):
        tokens = tokenizer(["abcdef", "abc", "defg"])
    assert tokens.tolist() == [[97, 98, 99, 256], [97, 98, 99, 256], [100, 101, 102, 256]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer("more than four")
        assert tokenizer("ab").shape == (1, 3)
    assert tokenizer.num_truncated == 3
    with pytest.warns(UserWarning, match=r"1 of 1 .* context_length=2"):
        tokens = get_tokenizer("longnet_clip_tiny")("abc", 2)
    assert tokens.tolist() == [[97, 256]]


def test_long_texts_can_be_refused():
    tokenizer = get_tokenizer("longnet_clip_tiny", context_length=4, on_long="raise")
    with pytest.raises(ValueError, match=r"1 of 2 texts .*context_length=4 .* has 5 .*Shorten"):
        tokenizer(["abc", "abcd"])
    assert tokenizer.num_truncated == 0


def test_a_file_without_padding_gets_a_new_id(word_file):
    tokenizer = get_tokenizer("longnet_clip_tiny", file=word_file)
    tokens = tokenizer(["a cat", "dog"])
    assert tokens.tolist() == [[2, 3, 1], [4, 1, 5]]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (5, 6)
    assert tokenizer.decode(tokens) == ["a cat", "dog"]
    text = {"vocab_size": tokenizer.vocab_size, "num_layers": 1}
    model = make(text=text, pad_id=tokenizer.pad_id)
    assert isinstance(model, LongNetCLIP)
    alone = model.encode_text(tokenizer("dog"))
    torch.testing.assert_close(model.encode_text(tokens)[1:], alone, atol=1e-5, rtol=1e-5)


def test_padding_of_a_file_is_kept(word_file):
    tokenizer = BatchTokenizer(load_tokenizer(str(word_file), pad_token="dog"), context_length=9)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (4, 5)
    assert tokenizer(["a", "a a"]).tolist() == [[2, 1, 4], [2, 2, 1]]


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    assert tokenizer.decode(tokenizer("a\ud83d")) == ["a?"]


def test_bad_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one text, got none"):
        tokenizer([])
    with pytest.raises(TypeError, match=r"must be strings, got b'a' \(bytes\) as number 1"):
        tokenizer(["a", b"a"])
    with pytest.raises(TypeError, match=r"texts must be a string or several, got None"):
        tokenizer(None)
    with pytest.raises(TypeError, match=r"context_length must be an integer, got 7.0"):
        tokenizer("a", 7.0)
    with pytest.raises(ValueError, match="context_length must be at least 1, got 0"):
        get_tokenizer("longnet_clip_tiny", context_length=0)
    with pytest.raises(ValueError, match=r"on_long must be one of \('truncate', .*, got 'drop'"):
        BatchTokenizer(ByteTokenizer(), context_length=3, on_long="drop")
    with pytest.raises(ValueError, match=r"image-text models, got 'longnet_lm_tiny', a text model"):
        get_tokenizer("longnet_lm_tiny")
    with pytest.raises(ValueError, match="no model is registered under the name 'longnet_clap"):
        get_tokenizer("longnet_clap_tiny")
