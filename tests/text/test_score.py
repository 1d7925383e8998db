"""Scores of files, piece by piece."""

import math

import pytest
import torch

from longnet_zoo.factory import create_model
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.text import score, score_file
from longnet_zoo.tokenizers import ByteTokenizer, JsonTokenizer

PATTERN = {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}
SMALL = {"embed_dim": 24, "num_layers": 1, "num_heads": 4, **PATTERN}


@pytest.fixture
def model():
    return create_model("longnet_lm_tiny", **SMALL).eval()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"zeile ä {i}\n" for i in range(90)), encoding="utf-8")
    return path


@torch.no_grad()
def whole(model, path):
    """Bits per byte of one pass over a file, whose first byte follows the end of a document."""
    data = torch.tensor([list(path.read_bytes())])
    inputs = torch.cat([torch.tensor([[256]]), data[:, :-1]], dim=1)
    return float(model.loss(inputs, data)) / math.log(2)


@pytest.mark.parametrize("chunk_size", [None, 1, 64, 100])
def test_score_is_that_of_one_pass(model, file, chunk_size, monkeypatch):
    monkeypatch.setattr(score, "_PIECE_BYTES", 128)
    seen = []
    found = score_file(model, file, ByteTokenizer(), chunk_size=chunk_size, on_progress=seen.append)
    assert found.num_bytes == found.num_tokens == file.stat().st_size
    assert found.bits_per_byte == pytest.approx(whole(model, file), rel=1e-6)
    assert found.perplexity == pytest.approx(2**found.bits_per_byte)
    assert seen[-1] == found
    assert len(seen) == -(-found.num_bytes // (chunk_size or 8192))


def test_usual_chunks_end_with_the_longest_segment():
    model = create_model("longnet_lm_tiny")
    assert score._chunk_size(model.config.pattern) == 32768
    longer = create_model("longnet_lm_tiny", segment_lengths=(16384,), dilation_rates=(1,))
    assert score._chunk_size(longer.config.pattern) == 16384
    # Too long to read at once, too short to be worth it, and without common borders.
    for lengths in ((65536,), (64,), (5000, 12000)):
        pattern = DilatedPattern(segment_lengths=lengths, dilation_rates=(1,) * len(lengths))
        assert score._chunk_size(pattern) == 8192


def test_hopeless_perplexity_is_infinite():
    assert score.FileScore(num_bytes=1, num_tokens=1, nats=1e4).perplexity == math.inf


def test_parts_of_words_count_their_bytes(file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train([str(file)], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path)
    model = create_model("longnet_lm_tiny", **SMALL, vocab_size=tokenizer.vocab_size).eval()
    found = score_file(model, file, tokenizer, chunk_size=50)
    assert found.num_bytes == file.stat().st_size
    assert found.num_tokens < found.num_bytes / 2
    bits = found.nats / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / found.num_bytes)


def test_what_cannot_be_scored_is_refused(model, file, tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"must hold text, got .*empty with 0 bytes, .* 0 tokens"):
        score_file(model, tmp_path / "empty", ByteTokenizer())
    with pytest.raises(ValueError, match="must be a file, got"):
        score_file(model, tmp_path, ByteTokenizer())
    with pytest.raises(TypeError, match=r"chunk_size must be an integer, got 2.5"):
        score_file(model, file, ByteTokenizer(), chunk_size=2.5)
    with pytest.raises(ValueError, match=r"chunk_size must be 1 or more and below .*, got 0"):
        score_file(model, file, ByteTokenizer(), chunk_size=0)
    with pytest.raises(ValueError, match=r"below 2\*\*31, got 2147483648"):
        score_file(model, file, ByteTokenizer(), chunk_size=2**31)
    small = create_model("longnet_lm_tiny", **SMALL, vocab_size=100).eval()
    with pytest.raises(ValueError, match="all 259 ids of the tokenizer, got one with vocab_size=1"):
        score_file(small, file, ByteTokenizer())
    with pytest.raises(TypeError, match=r"must be a LongNetLM, .* got LongNetMLM"):
        score_file(create_model("longnet_mlm_tiny"), file, ByteTokenizer())
    with pytest.raises(FileNotFoundError):
        score_file(model, tmp_path / "none", ByteTokenizer())
