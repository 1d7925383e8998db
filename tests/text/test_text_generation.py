"""Writing on from texts."""

import random

import numpy as np
import pytest
import torch

from longnet_zoo.factory import create_model
from longnet_zoo.text import generate_text
from longnet_zoo.text.generation import _TextStream
from longnet_zoo.tokenizers import ByteTokenizer

OPTIONS = {"embed_dim": 24, "num_layers": 1, "num_heads": 4}
DRAW = {"temperature": 1.0, "seed": 0, "max_new_tokens": 80}


@pytest.fixture
def model():
    """Writes letters, at random."""
    model = create_model("longnet_lm_tiny", **OPTIONS, tie_embeddings=False).eval()
    # The sum of the features is 24.
    torch.nn.init.ones_(model.stack.norm.bias)
    weight = torch.full((259, 24), -9.0)
    weight[97:123] = torch.randn(26, 24) * 0.05
    model.head.weight.data = weight
    return model


def test_text_goes_on_alone_and_in_a_batch(model):
    tokenizer = ByteTokenizer()
    text = generate_text(model, tokenizer, "hello ", **DRAW)
    assert len(text) == 80
    assert text.isalpha()
    assert text == generate_text(model, tokenizer, "hello ", **DRAW)
    prompts = ["hello ", "", "a"]
    several = generate_text(model, tokenizer, prompts, max_new_tokens=20)
    alone = [generate_text(model, tokenizer, x, max_new_tokens=20) for x in prompts]
    assert several == alone


def test_stop_strings_end_the_text_and_are_no_part_of_it(model):
    text = generate_text(model, ByteTokenizer(), "x", **DRAW)
    parts = []
    stop = text[30:33]
    got = generate_text(
        model, ByteTokenizer(), "x", **DRAW, stop_strings=["?", stop], on_text=parts.append
    )
    assert got == text[: text.index(stop)]
    assert "".join(parts) == got
    assert len(parts) > 10


class Words:
    """Puts a space between words, as some tokenizers do, but none before the first."""

    vocab_size, eod_id, mask_id, pad_id = 259, 256, 257, 258

    def encode_batch(self, texts):
        return [np.array([97 + len(word) for word in text.split()], int) for text in texts]

    def decode(self, ids):
        return " ".join(chr(i) for i in ids if i < 256)


def test_tokens_read_as_they_do_behind_the_prompt(model):
    parts = []
    got = generate_text(model, Words(), "an  example", on_text=parts.append, max_new_tokens=5)
    assert len(got) == 10
    assert got.startswith(" ")
    assert "".join(parts) == got
    # Nothing but spaces is no token: as the beginning of a document.
    assert len(generate_text(model, Words(), "  ", max_new_tokens=5)) == 9


def test_text_ends_with_the_document_and_holds_no_special_tokens(model):
    model.head.weight.data[256] = 1.0
    assert generate_text(model, ByteTokenizer(), "x", max_new_tokens=9) == ""
    model.head.weight.data[256] = -9.0
    model.head.weight.data[257:] = 1.0
    assert len(generate_text(model, ByteTokenizer(), "x", max_new_tokens=9)) == 9


def streamed(tokens, stop_strings=()):
    parts = []
    stream = _TextStream(ByteTokenizer(), stop_strings, parts.append)
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.end()
    return parts


def test_characters_come_whole():
    assert streamed("aä€😀".encode()) == ["a", "ä", "€", "😀"]
    assert "".join(streamed(b"a\xff\xffbcd\xe2")) == "a\ufffd\ufffdbcd\ufffd"


def test_streamed_text_is_that_of_all_tokens():
    draw = random.Random(0)
    for _ in range(300):
        characters = [draw.choice("aä€😀").encode() for _ in range(6)]
        ids = b"".join(x[: draw.randint(1, 4)] for x in characters) + draw.randbytes(3)
        assert "".join(streamed(ids)) == ids.decode(errors="replace")


def test_what_may_begin_a_stop_string_is_held_back():
    assert streamed(b"ab\nc", ["\n\n"]) == ["a", "b", "\nc"]
    assert streamed(b"ab\n", ["\n\n"]) == ["a", "b", "\n"]
    assert streamed(b"ab\n\n", ["\n\n"]) == ["a", "b"]


def test_bad_calls_are_refused(model):
    with pytest.raises(ValueError, match=r"a single text with on_text, got \['a', 'b'\]"):
        generate_text(model, ByteTokenizer(), ["a", "b"], on_text=print)
    with pytest.raises(ValueError, match=r"must be a text or some, .* got \[\]"):
        generate_text(model, ByteTokenizer(), [])
    with pytest.raises(TypeError, match=r"must be a text or texts, got \[b'a'\]"):
        generate_text(model, ByteTokenizer(), [b"a"])
    small = create_model("longnet_lm_tiny", **OPTIONS, vocab_size=100).eval()
    with pytest.raises(ValueError, match="all 259 ids of the tokenizer"):
        generate_text(small, ByteTokenizer(), "a")
