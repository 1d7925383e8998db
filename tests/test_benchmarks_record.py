"""Finished cells survive interrupts and are not mixed with those of other runs."""

import argparse
import importlib.util
import json
import re
import signal

import pytest
import torch

from benchmarks import kernels, length, memory, models, slide_encoder
from benchmarks import record as module
from benchmarks.record import Crash, Record, run_programme
from longnet_zoo.bench import record as shared

CPU = torch.device("cpu")


def make(path, resume=True, **settings):
    return Record("kernels", {"sizes": (1, 2), **settings}, device=CPU, output=path, resume=resume)


@pytest.fixture(autouse=True)
def keep_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_every_cell_is_on_disk_at_once(tmp_path):
    path = tmp_path / "new" / "x.json"
    record = make(path)
    record.add([{"name": "a", "ms": 1.23456789, "ratios": {"b": 2 / 3}}])
    document = json.loads(path.read_text())
    assert document["cells"] == [{"name": "a", "ms": 1.2346, "ratios": {"b": 0.66667}}]
    assert document["is_complete"] is False
    record.complete()
    assert json.loads(path.read_text())["is_complete"] is True
    assert list(path.parent.iterdir()) == [path]


def test_a_resumed_run_has_the_cells_of_the_first(tmp_path):
    path = tmp_path / "x.json"
    make(path).add([{"name": "a", "size": 1}])
    again = make(path)
    assert again.find(name="a") == {"name": "a", "size": 1}
    assert again.find(name="a", size=2) is None
    again.add([{"name": "b"}])
    assert [cell["name"] for cell in make(path).cells] == ["a", "b"]
    assert make(path, resume=False).cells == []


def test_another_run_is_not_resumed(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    make(path).add([{"name": "a"}])
    with pytest.raises(
        ValueError, match=r"settings \{'sizes': \[1, 2\]\} and this run .*'more': 1"
    ):
        make(path, more=1)
    with pytest.raises(ValueError, match="benchmark kernels and this run length"):
        Record("length", {"sizes": (1, 2)}, device=CPU, output=path, resume=True)
    real = shared.environment
    monkeypatch.setattr(shared, "environment", lambda device: {**real(device), "date": "later"})
    assert make(path).find(name="a")
    for name in ("device", "commit"):
        monkeypatch.setattr(shared, "environment", lambda _, name=name: {**real(CPU), name: "new"})
        with pytest.raises(ValueError, match=rf"'{name}': 'new'.* Run without --resume"):
            make(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cells": [1], "environment": {}}'])
def test_a_broken_file_is_not_resumed(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json must hold JSON that a benchmark has written"):
        make(path)


def test_last_line_is_one_json_document(capsys):
    record = make(None)
    record.add([{"name": "a"}])
    record.complete()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cells"] == [{"name": "a"}]


def test_command_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    arguments = ["--rounds", "3", "--resume", "--output", str(path)]
    monkeypatch.setattr("sys.argv", ["somewhere/benchmarks/kernels.py", *arguments])
    expected = "python -m benchmarks.kernels --rounds 3 --output benchmarks/results/x.json"
    assert make(path).document["command"] == expected


def exit_code(main, **options):
    given = argparse.Namespace(**{"output": None, "picture": None, "resume": False, **options})
    with pytest.raises(SystemExit) as caught:
        run_programme(main, given)
    return caught.value.code


def test_exit_codes_say_how_a_run_ended(capsys, tmp_path):
    def fail(error):
        raise error

    assert exit_code(lambda options: 0) == 0
    assert exit_code(lambda options: 1) == 1
    assert exit_code(lambda options: fail(ValueError("bad value"))) == 2
    assert "error: bad value" in capsys.readouterr().err
    assert exit_code(lambda options: fail(KeyboardInterrupt())) == 130
    assert "nothing is kept" in capsys.readouterr().err
    assert exit_code(lambda options: signal.raise_signal(signal.SIGTERM)) == 130
    assert exit_code(lambda options: fail(Crash("x broke the device")), output=tmp_path) == 75
    assert f"x broke the device\nfinished cells are kept in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(KeyError):
        run_programme(
            lambda options: fail(KeyError()), argparse.Namespace(output=None, picture=None)
        )


def test_pictures_where_asked_for_or_possible(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.json"
    drawn = []
    monkeypatch.setattr(module, "draw_result", lambda path: drawn.append(path) or ())
    exit_code(lambda options: 0, output=path)
    exit_code(lambda options: 0, output=path, picture=False)
    exit_code(lambda options: 0)
    assert drawn == [path]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert exit_code(lambda options: 0, output=path) == 0
    assert drawn == [path]
    assert exit_code(None, output=path, picture=True) == 2
    assert "error: drawing a picture needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["resume", "picture"])
def test_what_needs_a_file_is_refused_without_one(option, capsys):
    assert exit_code(None, **{option: True}) == 2
    assert "--resume and --picture need --output FILE, got none" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, OSError, ImportError])
def test_what_users_cause_is_one_line(error, capsys):
    def fail(options):
        raise error("two\nlines")

    assert exit_code(fail) == 2
    assert capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize(
    ("programme", "arguments", "message"),
    [
        (kernels, "--device cuda", "'cuda' was asked for, and .* sees 0 GPUs"),
        (kernels, "--device cpu --output {file}/x.json", "can be written, got '.*file/x.json'"),
        (kernels, "--device cpu --output {folder}", "got '.*': it is a folder"),
        (kernels, "--write-preference {file}", "file must hold JSON that .* got JSONDecodeError"),
        (kernels, "--threads -1", "--threads: must be an integer of at least 1, got '-1'"),
        (length, "--rounds 0", "--rounds: must be an integer of at least 1, got '0'"),
        (models, "--num-layers 0", "--num-layers: must be an integer of at least 1, got '0'"),
        (models, "--device cpu --cases nosuch:64", "under the name 'nosuch'"),
        (memory, "--seq-len 0", "--seq-len: must be an integer of at least 1, got '0'"),
        (memory, "--model longvit_tiny_patch8_64", "got 'longvit_tiny_patch8_64' of vision"),
        (memory, "--output {file}/x.json", "can be written, got '.*file/x.json'"),
        (slide_encoder, "--output {file}/x.json", "can be written, got '.*file/x.json'"),
    ],
)
def test_wrong_options_end_with_one_line_and_code_2(
    programme, arguments, message, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = arguments.format(file=file, folder=tmp_path).split()
    with pytest.raises(SystemExit) as caught:
        run_programme(programme.main, programme.read_options(given))
    assert caught.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert re.search(message, found.err)
