"""Finished cells survive interrupts and are not mixed with those of other runs."""

import argparse
import importlib.util
import json
import signal

import pytest
import torch

from benchmarks import record as module
from benchmarks.record import Crash, Record, run_programme

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
    real = module.environment
    monkeypatch.setattr(module, "environment", lambda device: {**real(device), "date": "later"})
    assert make(path).find(name="a")
    monkeypatch.setattr(module, "environment", lambda device: {**real(device), "device": "other"})
    with pytest.raises(ValueError, match=r"'device': 'other'.* Run without --resume"):
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


def test_pictures_where_asked_for_or_possible(tmp_path, monkeypatch):
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
    with pytest.raises(RuntimeError, match="needs matplotlib"):
        run_programme(lambda options: 0, argparse.Namespace(output=path, picture=True))
