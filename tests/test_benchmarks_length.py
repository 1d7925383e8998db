import json

import pytest
import torch

from benchmarks import length
from benchmarks.contenders import PASSES, Shape
from benchmarks.record import Crash
from longnet_zoo.ops import DilatedPattern

PATTERN = DilatedPattern(segment_lengths=(16, 32), dilation_rates=(1, 2))
SHAPE = Shape(
    seq_len=64,
    num_heads=2,
    head_dim=8,
    dtype="float32",
    device=torch.device("cpu"),
    pattern=PATTERN,
)
ARGUMENTS = (
    "--device cpu --segment-lengths 16 32 --dilation-rates 1 2 --num-heads 2 --head-dim 8 --rounds "
    "1 --min-seq-len 64 --max-seq-len 256 --max-backward-seq-len 128"
)


def run(*extra):
    return length.main(length.read_options([*ARGUMENTS.split(), *map(str, extra)]))


def sizes(document):
    return [(cell["pass"], cell["seq_len"]) for cell in document["cells"]]


def test_lengths_double_up_to_what_is_asked_for(tmp_path, capsys):
    output = tmp_path / "length.json"
    assert run("--output", output) == 0
    document = json.loads(output.read_text())
    forward, both = PASSES
    assert sizes(document) == [
        (forward, 64),
        (forward, 128),
        (forward, 256),
        (both, 64),
        (both, 128),
    ]
    for cell in document["cells"]:
        assert cell["us_per_token"] == pytest.approx(
            1000 * cell["median_ms"] / cell["seq_len"], 1e-3
        )
        assert cell["kib_per_token"] == pytest.approx(
            1024 * cell["peak_extra_mib"] / cell["seq_len"], 1e-3
        )
        assert cell["ratios"]["time_per_token_over_shortest"] > 0
        num_inputs = 1 if cell["pass"] == forward else 2
        assert cell["input_mib"] == pytest.approx(
            num_inputs * cell["seq_len"] * 16 * 4 / 2**20, 1e-3
        )
    assert 0.9 < document["slopes"][forward]["memory"] < 1.1
    assert "time grows as N^" in capsys.readouterr().out


def test_finished_lengths_are_not_run_again(tmp_path, monkeypatch):
    output = tmp_path / "length.json"
    run("--output", output)
    document = json.loads(output.read_text())
    output.write_text(json.dumps({**document, "cells": document["cells"][:-1]}))
    measured = []
    measure = length.measure_length

    def spy(layer, shortest, key, *rest):
        measured.append((key["pass"], key["seq_len"]))
        return measure(layer, shortest, key, *rest)

    monkeypatch.setattr(length, "measure_length", spy)
    run("--output", output, "--resume")
    assert measured == sizes(document)[-1:]
    again = json.loads(output.read_text())
    assert again["cells"][:-1] == document["cells"][:-1]
    assert sizes(again) == sizes(document)


def test_a_length_that_does_not_fit_ends_its_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(length, "available_mib", lambda device: 0.05)
    output = tmp_path / "length.json"
    assert run("--output", output) == 0
    cells = json.loads(output.read_text())["cells"]
    forward, both = PASSES
    assert [cell["pass"] for cell in cells if "reason" in cell] == [forward, both]
    assert all("MiB, 0 are free" in cell["reason"] for cell in cells if "reason" in cell)
    assert max(cell["seq_len"] for cell in cells) == 128


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory", 0),
        (RuntimeError("no kernel\nmore"), "no kernel", 1),
    ],
)
def test_an_error_is_the_reason_and_ends_its_pass(error, reason, code, tmp_path, monkeypatch):
    measure = length.measure_length

    def fail(layer, shortest, key, *rest):
        if key == {"pass": "forward", "seq_len": 128}:
            raise error
        return measure(layer, shortest, key, *rest)

    monkeypatch.setattr(length, "measure_length", fail)
    output = tmp_path / "length.json"
    assert run("--output", output) == code
    document = json.loads(output.read_text())
    forward, both = PASSES
    assert sizes(document) == [(forward, 64), (forward, 128), (both, 64), (both, 128)]
    assert document["cells"][1]["reason"] == reason


def test_a_broken_device_ends_the_run_with_the_reason_on_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: misaligned address\nmore")

    monkeypatch.setattr(length, "measure_length", fail)
    output = tmp_path / "length.json"
    with pytest.raises(Crash, match="forward of 64 tokens broke the device: CUDA error: misal"):
        run("--output", output)
    (cell,) = json.loads(output.read_text())["cells"]
    assert cell["reason"] == "CUDA error: misaligned address"


def test_slopes_of_known_laws():
    cells = [
        {"pass": "forward", "seq_len": n, "median_ms": 3e-3 * n**2, "peak_extra_mib": 5.0 * n}
        for n in (8, 16, 32, 64)
    ]
    cells[0]["median_ms"] = 1e6
    cells.append({"pass": "forward", "seq_len": 128, "reason": "out of memory"})
    assert length.slopes(cells, "forward", 16) == pytest.approx({"time": 2, "memory": 1})
    assert length.slopes(cells, "forward", 64) == {}
    assert length.slopes(cells, "forward+backward", 1) == {}


def test_pieces_give_what_the_whole_gives():
    layer = length.make_layer(SHAPE, "auto")
    x, out_grad = torch.randn(2, 1, 100, 16)
    torch.testing.assert_close(length.forward(layer, x, 32), layer(x))
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(out_grad)
    torch.testing.assert_close(length.forward_backward(layer, x, out_grad, 64), leaf.grad)
    assert all(weight.grad is None for weight in layer.parameters())


def test_pieces_take_the_memory_of_a_piece(tmp_path):
    output = tmp_path / "length.json"
    assert run("--output", output, "--piece-len", 64) == 0
    cells = json.loads(output.read_text())["cells"]
    _, two, four = (x["peak_extra_mib"] for x in cells if x["pass"] == "forward")
    # Two pieces more: as many tokens more of the output, with 16 channels.
    assert four - two == pytest.approx(2 * 64 * 16 * 4 / 2**20, rel=0.01)


@pytest.mark.parametrize("piece_len", [0, 16, 48])
def test_pieces_that_a_segment_would_cross_are_refused(piece_len):
    with pytest.raises(ValueError, match=rf"got {piece_len} and .*\(16, 32\)\. Take 32"):
        length.check_piece_len(piece_len, PATTERN)
    crossing = DilatedPattern(segment_lengths=(24, 32), dilation_rates=(1, 2))
    with pytest.raises(ValueError, match=r"got 32 and segment_lengths=\(24, 32\)"):
        length.check_piece_len(32, crossing)


def test_a_wrong_layer_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(length, "check_backend", lambda *_: "wrong: dq is off")
    assert run() == 1
    assert "not timed: wrong: dq is off" in capsys.readouterr().out
    monkeypatch.setattr(length, "check_backend", lambda *_: None)
    monkeypatch.setattr(length, "forward", lambda layer, x, piece_len: x * piece_len)
    assert run() == 1
    assert "not timed: output in pieces is off by" in capsys.readouterr().out
