"""The weights that come with the package."""

import importlib.util
import json
import lzma
import math
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import model_card
from longnet_zoo.cli import main
from longnet_zoo.factory import create_model, list_models
from longnet_zoo.registry import find_model
from longnet_zoo.text import score_file
from longnet_zoo.tokenizers import load_tokenizer
from longnet_zoo.weights import sources
from recipes.text_corpus import Corpus

SHIPPED = [
    (name, weights)
    for name in list_models(pretrained=True)
    for weights in find_model(name).weights
    if weights.is_shipped
]
# Of the standard library, and none of the files that the weights have read.
HELD_OUT = "xml.dom.expatbuilder"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def text():
    return Path(importlib.util.find_spec(HELD_OUT).origin).read_bytes()


@pytest.fixture(scope="module")
def model():
    return create_model("longnet_lm_tiny", pretrained=True).eval()


@torch.no_grad()
def bits_per_byte(model, text, context):
    """Bits per byte of `text` behind its first byte, in pieces that cannot see each other."""
    tokens = torch.tensor(list(text))
    rows = (x.view(-1, context) for x in (tokens[:-1], tokens[1:]))
    return model.loss(*rows).item() / math.log(2)


@pytest.mark.parametrize(("name", "weights"), SHIPPED, ids=lambda x: getattr(x, "tag", x))
def test_files_are_small_whole_and_described(name, weights):
    folder = sources._SHIPPED / weights.location.partition(":")[2]
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert weights.sha256  # so that what was changed is refused
    assert weights.licence in ("Apache-2.0", "MIT")


def test_something_is_shipped_under_its_tag_too(model):
    assert [name for name, _ in SHIPPED] == ["longnet_lm_tiny"]
    tagged = create_model("longnet_lm_tiny", pretrained=SHIPPED[0][1].tag)
    assert all(torch.equal(x, tagged.state_dict()[key]) for key, x in model.state_dict().items())
    assert {x.dtype for x in model.parameters()} == {torch.float32}


def test_the_text_of_these_tests_was_held_out():
    key = f"stdlib/{HELD_OUT.replace('.', '/')}.py"
    assert Corpus(source="python").split_of(key) == "test"


def test_it_beats_random_weights_and_a_packer(model, text):
    part = text[: 8192 + 1]
    own = bits_per_byte(model, part, 8192)
    torch.manual_seed(0)
    drawn = bits_per_byte(create_model("longnet_lm_tiny").eval(), part, 8192)
    packed = 8 * len(lzma.compress(part[1:], preset=9 | lzma.PRESET_EXTREME)) / 8192
    assert own < 2
    assert drawn > 8
    assert own < packed - 0.3


def test_a_longer_context_helps(model, text):
    part = text[: 16_384 + 1]
    by_context = [bits_per_byte(model, part, context) for context in (256, 2048, 16_384)]
    assert by_context == sorted(by_context, reverse=True)
    assert by_context[0] - by_context[-1] > 0.05


def test_reading_piece_by_piece_gives_the_same(model, text, tmp_path):
    file = tmp_path / "held_out.py"
    file.write_bytes(text[:4096])
    tokenizer = load_tokenizer("bytes")
    score = score_file(model, file, tokenizer, chunk_size=1024)
    tokens = torch.tensor([tokenizer.eod_id, *text[:4096]])[None]
    with torch.no_grad():
        whole = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert score.bits_per_byte == pytest.approx(whole / math.log(2), rel=1e-4)


def test_generate_uses_it_without_being_asked(capsys):
    prompt = "    def __init__("
    assert main(["generate", prompt, "--max-new-tokens=20", "--temperature=0"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"{prompt}self")


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="num_layers"):
        create_model("longnet_lm_tiny", pretrained=True, num_layers=2)


def test_card_is_fresh():
    files = [model_card.SCORES, model_card.RUN, model_card.DENSE_RUN]
    documents = [json.loads(file.read_text()) for file in files if file.exists()]
    card = model_card.CARD.read_text(encoding="utf-8")
    assert card == model_card.card(*documents), "run `python -m benchmarks.model_card`"
