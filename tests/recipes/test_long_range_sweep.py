"""Dilated against dense in many runs: what is finished stays, what failed is named."""

import contextlib
import dataclasses
import json

import pytest

from longnet_zoo.long_range import (
    TRAINING_FILE,
    SelectiveCopying,
    draw_examples,
    flops_per_example,
    load_source,
    majority,
)
from longnet_zoo.long_range.models import Source
from longnet_zoo.registry import find_model
from recipes import long_range, long_range_sweep
from recipes.long_range_sweep import Run, SweepConfig, main, run_sweep

ARGUMENTS = (
    "--model.start_len=null",
    "--model.task_options.num_data_tokens=8",
    "--model.model_options.embed_dim=8",
    "--model.model_options.num_layers=1",
    "--model.model_options.num_heads=2",
    "--model.train_flops=2e6",
    "--data.test_examples=5",
    "--data.val_examples=2",
    "--data.batch_size=2",
)


def make_config(tmp_path, **options):
    usual = {"tasks": ("selective_copying",), "lengths": (32, 16), "seeds": 2, "jobs": 1}
    places = {"folder": tmp_path / "runs", "output": tmp_path / "out" / "found.json"}
    places["page"] = tmp_path / "docs" / "page.md"
    return SweepConfig(**{**usual, **places, "arguments": ARGUMENTS, **options})


@pytest.fixture
def in_process(monkeypatch):
    """Runs trainings in this process, and counts them."""
    commands = []

    def run(processes, command, *, folder):
        assert command[1:3] == ["-m", "recipes.long_range"]
        commands.append(command)
        with contextlib.suppress(SystemExit):
            long_range.main(command[3:])

    monkeypatch.setattr(long_range_sweep.Processes, "run", run)
    return commands


def test_a_sweep_compares_at_equal_flops_and_does_nothing_twice(tmp_path, in_process, capsys):
    config = make_config(tmp_path)
    (cells,) = run_sweep(config).values()
    assert [(cell.seq_len, cell.label) for cell in cells] == [
        *((16, "dilated"), (16, "dense")),
        *((32, "dilated"), (32, "dense")),
    ]
    for cell in cells:
        task = SelectiveCopying(seq_len=cell.seq_len, num_data_tokens=8)
        assert len(cell.accuracies) == 2
        assert cell.num_examples == 5
        constants = [majority(task, draw_examples(task, 5, seed=x), seed=x) for x in (0, 1)]
        assert cell.majority == sum(constants) / 2
        run = Run(task="selective_copying", seq_len=cell.seq_len, attention=cell.label, seed=1)
        model, training = load_source(Source(label="a", place=str(run.folder(config) / "model")))
        assert model.config.pattern.is_dense == (cell.label == "dense")
        assert cell.flops == flops_per_example(model, task)
        # Within half a step of two examples.
        step = 2 * flops_per_example(model, task, is_training=True)
        assert abs(training["train_flops"] - 2e6) <= step / 2
        assert cell.train_seq_lens == (cell.seq_len,)
        record = json.loads((run.folder(config) / "metrics.json").read_text())["test"]
        assert cell.accuracies[1] == record["right"] / record["asked"]
    assert len(in_process) == 8
    document = json.loads(config.output.read_text())
    assert [cell["accuracies"] for cell in document["tasks"]["selective_copying"]] == [
        list(cell.accuracies) for cell in cells
    ]
    assert config.output.with_suffix(".png").stat().st_size > 10_000
    assert document["command"].startswith(
        "python -m recipes.long_range_sweep --tasks selective_copying --lengths 32 16 --seeds 2 "
        "--argument=--model.start_len=null "
    )
    page = config.page.read_text()
    assert "![accuracy over length](../out/found.svg)" in page
    assert page.count("\n## ") == 1
    assert "Spread is each of\nseveral runs, of a single one the 95 % interval" in page
    assert "most frequent in training examples" in page
    assert "## selective_copying\n\nSelective copying (Gu and Dao, arXiv 2312.00752): pick" in page
    assert "`longnet_lm_tiny` begins untrained; segments (length : rate) 16 : 1, 4,096 : 2" in page
    assert ", `num_data_tokens=8`" in page
    assert page.count("\n| ") == 2 + 2 * 4
    assert f"| dense | {100 * cells[3].mean:.1f} |" in page
    printed = capsys.readouterr().out
    assert "8 runs in" in printed
    share = 100 * cells[1].accuracies[1]
    assert "8/8 selective_copying-" in printed
    assert f"/16-dense-seed1: {share:.1f} % right after" in printed
    assert run_sweep(config)["selective_copying"] == cells
    assert len(in_process) == 8


@pytest.mark.parametrize("seq_len", [256, 1024, 3000, 100_000])
def test_batches_of_any_length_have_as_many_tokens(seq_len):
    command = Run(task="mqar", seq_len=seq_len, attention="dense", seed=0).command(SweepConfig())
    (batch_size,) = (int(word.split("=")[1]) for word in command if "batch_size" in word)
    usual = long_range_sweep._settings("mqar")
    num_tokens = usual["data"]["batch_size"] * usual["model"]["seq_len"]
    assert batch_size == 1 or num_tokens - seq_len < batch_size * seq_len <= num_tokens
    assert (batch_size == 1) == (2 * seq_len > num_tokens)


def test_the_table_has_what_the_arguments_have_made_of_the_task(tmp_path, in_process):
    options = ("num_data_tokens=2", "vocab_size=6")
    arguments = (*ARGUMENTS, *(f"--model.task_options.{option}" for option in options))
    config = make_config(tmp_path, lengths=(16,), seeds=1, arguments=arguments)
    task = SelectiveCopying(seq_len=16, num_data_tokens=2, vocab_size=6)
    for cell in run_sweep(config)["selective_copying"]:
        assert (cell.seq_len, cell.chance) == (16, 1 / 4)
        assert cell.majority == majority(task, draw_examples(task, 5))
        run = Run(task="selective_copying", seq_len=16, attention=cell.label, seed=0)
        model, _ = load_source(Source(label="a", place=str(run.folder(config) / "model")))
        assert cell.flops == flops_per_example(model, task)
        record = json.loads((run.folder(config) / "metrics.json").read_text())["test"]
        assert [cell.low, cell.high] == record["interval"]


def test_unfinished_runs_are_run_again_and_runs_of_other_settings_stay(tmp_path, in_process):
    config = make_config(tmp_path, lengths=(16,), seeds=1)
    (cells,) = run_sweep(config).values()
    first = Run(task="selective_copying", seq_len=16, attention="dense", seed=0)
    (first.folder(config) / "metrics.json").unlink()
    in_process.clear()
    run_sweep(config)
    # It goes on from its checkpoint.
    assert [command[-2:] for command in in_process] == [["--ckpt_path", "last"]]
    in_process.clear()
    for batch_size in (3, "three"):
        arguments = (*ARGUMENTS, f"--data.batch_size={batch_size}")
        other = dataclasses.replace(config, arguments=arguments)
        is_bad = batch_size == "three"
        with pytest.raises(RuntimeError, match="failed") if is_bad else contextlib.nullcontext():
            run_sweep(other)
        assert [command[-1] for command in in_process] == [arguments[-1]] * 2
        in_process.clear()
    assert run_sweep(config)["selective_copying"] == cells
    assert not in_process
    settings = [json.loads(file.read_text()) for file in config.folder.glob("*/settings.json")]
    assert sorted(found["arguments"][-1] for found in settings) == [
        "--data.batch_size=2",
        "--data.batch_size=3",
        "--data.batch_size=three",
    ]


def test_figures_name_the_code_and_the_machine_of_every_run(tmp_path, in_process):
    config = make_config(tmp_path, lengths=(16,), seeds=1)
    run_sweep(config)
    run = Run(task="selective_copying", seq_len=16, attention="dense", seed=0)
    file = run.folder(config) / "metrics.json"
    record = json.loads(file.read_text())
    date = record["environment"]["date"]
    assert json.loads(config.output.read_text())["environment"]["date"] == [date]
    record["environment"] |= {"date": "2020-02-20", "commit": "abcdefg"}
    file.write_text(json.dumps(record))
    run_sweep(config)
    found = json.loads(config.output.read_text())["environment"]
    assert found["date"] == ["2020-02-20", date]
    assert "abcdefg" in found["commit"]
    assert f"2020-02-20, {date}." in config.page.read_text()


def test_a_file_need_not_have_the_name_of_its_task(tmp_path, monkeypatch, in_process):
    (tmp_path / "configs").mkdir()
    written = long_range_sweep._config("selective_copying").read_text()
    (tmp_path / "configs" / "copying_small.yaml").write_text(written)
    monkeypatch.setattr(long_range_sweep, "_CONFIGS", tmp_path / "configs")
    config = make_config(tmp_path, tasks=("copying_small",), lengths=(16,), seeds=1)
    run_sweep(config)
    assert "## copying_small\n\nSelective copying" in config.page.read_text()


@pytest.mark.parametrize("lengths", [(), (1024, 0)])
def test_a_comparison_needs_lengths(lengths):
    with pytest.raises(ValueError, match=r"lengths must be 1 or more, one at least, got \("):
        SweepConfig(lengths=lengths)


def test_figures_of_other_weights_are_not_kept(tmp_path, monkeypatch):
    config = make_config(tmp_path, tasks=("passkey",))
    runs = [run for run in long_range_sweep._runs(config) if run.seed == 0]
    for run in runs:
        folder = run.folder(config)
        (folder / "model").mkdir(parents=True)
        for name in ("metrics.json", f"model/{TRAINING_FILE}"):
            (folder / name).touch()
    assert all(run.is_finished(config) for run in runs)
    entry = find_model("longnet_lm_tiny")
    weights = tuple(dataclasses.replace(x, sha256="0" * 64) for x in entry.weights)
    other = dataclasses.replace(entry, weights=weights)
    monkeypatch.setattr(long_range_sweep, "find_model", lambda name: other)
    assert not any(run.is_finished(config) for run in runs)
    untrained = dataclasses.replace(config, arguments=("--model.pretrained=false",))
    assert "weights" in runs[0].settings(config)
    assert "weights" not in runs[0].settings(untrained)


def test_a_run_that_fails_is_named_after_the_others(tmp_path, in_process, capsys):
    config = make_config(tmp_path, lengths=(8, 16), seeds=1)
    # Eight data tokens and their markers do not fit into eight places.
    with pytest.raises(RuntimeError, match=r"2 of 4 runs failed: see .*/8-dilated-seed0/log.txt"):
        run_sweep(config)
    assert len(in_process) == 4
    assert "/8-dense-seed0: failed" in capsys.readouterr().out
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "copying"], r"got ['copying']; there are"),
        (["--jobs", "0"], "jobs must be 1 or more, got 0"),
        (["--seeds", "0"], "seeds must be 1 or more, got 0"),
        (["--output", "out.png"], "output must end in .json, got out.png"),
        (["--argument=--model.seq_len=64"], "cannot set model.seq_len, which the comparison sets"),
        (["--argument=--config=other.yaml"], "cannot set config, which"),
        (["--argument=--model={}"], "cannot set model, which"),
        (["--argument=--model.seq_len"], "must be --NAME=VALUE, got '--model.seq_len'"),
    ],
)
def test_bad_options_are_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_sweep_is_called_in_the_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([])
    assert f"there is no configs/long_range in {tmp_path}." in capsys.readouterr().err


def test_a_stop_reaches_what_runs_and_what_waits(tmp_path, monkeypatch):
    begun, stopped = [], []

    def run(processes, command, *, folder):
        begun.append(command)
        if len(begun) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(long_range_sweep.Processes, "run", run)
    monkeypatch.setattr(long_range_sweep.Processes, "stop", lambda self: stopped.append(self))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(make_config(tmp_path))
    assert len(begun) < 8
    assert len(stopped) == 1


def test_a_length_that_is_given_twice_is_run_once(tmp_path):
    config = make_config(tmp_path, lengths=(16, 16), seeds=1)
    assert len(long_range_sweep._runs(config)) == 2
