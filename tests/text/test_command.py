"""`longnet-zoo generate` and `longnet-zoo stream`."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from longnet_zoo import registry
from longnet_zoo.cli import main
from longnet_zoo.factory import create_model
from longnet_zoo.registry import PublishedWeights, find_model
from longnet_zoo.text import generate_text, score_file
from longnet_zoo.text.generation import printable
from longnet_zoo.tokenizers import ByteTokenizer

OPTIONS = {"embed_dim": 24, "num_layers": 1, "num_heads": 4}
RANDOM = ["--pretrained", "random"]
FLAGS = [f"--option={name}={value}" for name, value in OPTIONS.items()]


@pytest.fixture
def weights(tmp_path):
    model = create_model("longnet_lm_tiny", **OPTIONS).eval()
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    return model, tmp_path / "w.safetensors"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"the quick brown fox\n" * 50)
    return path


def test_stream_prints_the_score(weights, file, capsys):
    model, path = weights
    main(["stream", "--file", str(file), "--pretrained", str(path), *FLAGS, "--chunk-size=300"])
    captured = capsys.readouterr()
    expected = score_file(model, file, ByteTokenizer())
    assert f"a.txt: {expected.bits_per_byte:.4f} bits per byte over 1,000 bytes" in captured.out
    assert "100 %" in captured.err
    assert "drawn at random" not in captured.err
    main(["stream", "--file", str(file), "--pretrained", str(path), *FLAGS, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert (found["num_tokens"], found["num_bytes"]) == (1000, 1000)
    half = ["--pretrained", str(path), *FLAGS, "--json", "--dtype=bfloat16", "--chunk-size=9"]
    main(["stream", "--file", str(file), *half])
    rounded = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert rounded != found["bits_per_byte"]
    assert rounded == pytest.approx(found["bits_per_byte"], rel=0.01)


def test_generate_prints_as_it_writes(weights, capsys):
    model, path = weights
    flags = ["--pretrained", str(path), *FLAGS, "--max-new-tokens=30", "--seed=3", "--top-k=5"]
    main(["generate", "def ", *flags])
    expected = generate_text(
        model, ByteTokenizer(), "def ", max_new_tokens=30, seed=3, top_k=5, temperature=0.8
    )
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in expected)
    assert capsys.readouterr().out == f"def {shown}\n"


def test_every_option_of_generate_reaches_the_text(weights, capsys):
    _, path = weights
    flags = ["--pretrained", str(path), *FLAGS, "--max-new-tokens=40", "--seed=3"]

    def written(*more):
        main(["generate", "x", *flags, *more])
        return capsys.readouterr().out

    plain = written()
    assert written() == plain
    text = plain[1:-1]
    assert written("--stop", text[9:12]) == f"x{text[: text.index(text[9:12])]}\n"
    for option in ("--temperature=0", "--top-k=2", "--top-p=0.1", "--min-p=0.9"):
        assert written(option) != plain, option
    assert written("--repetition-penalty=5") != plain


def test_a_prompt_may_have_bytes_that_are_no_text(weights, capsys):
    model, path = weights
    prompt = b"a\xff".decode(errors="surrogateescape")
    options = ["--pretrained", str(path), *FLAGS, "--max-new-tokens=5", "--temperature=0"]
    main(["generate", prompt, *options])
    new = model.generate(torch.tensor([[ord("a"), 255]]), max_new_tokens=5, temperature=0)
    written = generate_text(model, ByteTokenizer(), prompt, max_new_tokens=5, temperature=0)
    assert written == ByteTokenizer().decode(new[0].tolist())
    assert capsys.readouterr().out == f"{printable(f'{prompt}{written}')}\n"


def test_a_seed_also_draws_the_weights(capsys):
    args = ["generate", "x", *FLAGS, *RANDOM, "--max-new-tokens=20", "--seed=3"]
    outs = [main(args) or capsys.readouterr().out for _ in range(2)]
    assert outs[0] == outs[1]


def test_weights_that_come_with_the_package_are_the_default(weights, capsys, monkeypatch):
    _, path = weights
    entry = find_model("longnet_lm_tiny")
    args = ["generate", "x", *FLAGS, "--max-new-tokens=20", "--seed=3"]
    main([*args, "--pretrained", str(path)])
    expected = capsys.readouterr().out
    folder = path.parent / "own"
    folder.mkdir()
    path.rename(folder / "model.safetensors")
    monkeypatch.setattr("longnet_zoo.weights.sources._SHIPPED", path.parent)
    shipped = PublishedWeights(tag="own", location="shipped:own", licence="MIT")
    elsewhere = PublishedWeights(tag="hub", location="hf_hub:a/b", licence="MIT")
    monkeypatch.setitem(registry._ENTRIES, entry.name, replace(entry, weights=(elsewhere, shipped)))
    main(args)
    captured = capsys.readouterr()
    assert captured.out == expected
    assert captured.err == ""
    main([*args, *RANDOM])
    captured = capsys.readouterr()
    assert captured.out != expected
    assert captured.err == ""


def test_weights_drawn_without_being_asked_for_are_noted(capsys, monkeypatch):
    entry = find_model("longnet_lm_tiny")
    monkeypatch.setitem(registry._ENTRIES, entry.name, replace(entry, weights=()))
    main(["generate", "x", *FLAGS, "--max-new-tokens=1"])
    assert "the weights of longnet_lm_tiny are drawn at random" in capsys.readouterr().err


def test_nothing_is_printed_before_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "hello", *FLAGS, *RANDOM, "--temperature=-1"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stream", "--file", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["generate", "a", "--model", "longnet_mlm_tiny"], "causal model of text, .* 'longnet_mlm"),
        (
            ["generate", "a", "--top-p", "2", *FLAGS, *RANDOM],
            r"top_p must be None, or in \(0, 1\], got 2.0",
        ),
        (["generate", "a", "--option", "x"], "--option must be NAME=VALUE, got 'x'"),
        (["generate", "a", "--tokenizer", "none.json"], "there is no file none.json"),
        (["generate", "a", "--device", "tpu"], "device must be 'auto', .* got 'tpu'"),
    ],
)
def test_wrong_arguments_end_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, last), last
