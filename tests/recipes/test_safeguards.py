"""What keeps a run from meaning something else than it says, or from costing an earlier one."""

import json
import math
import os
import signal

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from recipes.context import ContextCurve, ContextFigures
from recipes.report import ReportCallback
from recipes.report_figure import draw_report
from recipes.run_folder import check_resumed_folder, make_room
from recipes.text_corpus import split_of
from recipes.text_lm import TextLM, main
from recipes.text_mlm import TextMLM
from tests.recipes.text_runs import (
    arguments,
    last_checkpoint_every,
    make_data,
    make_trainer,
    model_options,
)


def write_run(folder, *, has_checkpoint):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(f"{has_checkpoint}\n")
    if has_checkpoint:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").write_text("weights")


@pytest.mark.parametrize(
    ("task", "model_name", "message"),
    [
        (TextLM, "longnet_mlm_tiny", "objective='causal', got .*is_causal=False"),
        (TextMLM, "longnet_lm_tiny", "objective='masked', got .*is_causal=True"),
    ],
)
def test_a_model_of_the_other_direction_is_refused(task, model_name, message):
    with pytest.raises(ValueError, match=message):
        task(model_name=model_name, model_options=model_options())


@pytest.mark.parametrize(
    ("task", "objective", "needed"), [(TextLM, "masked", "causal"), (TextMLM, "causal", "masked")]
)
def test_data_for_the_other_objective_is_refused(corpus, tmp_path, task, objective, needed):
    model = task(model_options=model_options())
    data = make_data(corpus, objective=objective)
    with pytest.raises(ValueError, match=rf"data.objective='{needed}', got '{objective}'"):
        make_trainer(tmp_path).fit(model, datamodule=data)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "nowhere"}, "nowhere"),
        ({"data__batch_size": 10_000}, "batch_size=10000"),
        ({"model__model_options__vocab_size": 200}, "got vocab_size=200"),
    ],
)
def test_a_run_that_fails_on_its_data_moves_nothing(corpus, tmp_path, capsys, changes, message):
    args = arguments(corpus, tmp_path, trainer__max_steps=1)
    main(["fit", *args, *last_checkpoint_every(1)])
    main(["fit", *args, *last_checkpoint_every(1)])
    before = contents(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", *arguments(corpus, tmp_path, **changes), *last_checkpoint_every(1)])
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_config_of_a_resumed_run_does_not_name_the_checkpoint(corpus, tmp_path):
    args = ["fit", *arguments(corpus, tmp_path, trainer__max_steps=1), *last_checkpoint_every(1)]
    main(args)
    main([*args, "--ckpt_path=last", "--trainer.max_steps=2"])
    written = (tmp_path / "config.yaml").read_text()
    assert "max_steps: 2" in written
    assert "ckpt_path" not in written
    # And it is a configuration to start from.
    main(["fit", f"--config={tmp_path / 'config.yaml'}", "--ckpt_path=last"])


def test_a_run_out_of_time_says_so(corpus, tmp_path, capsys):
    args = ["fit", *arguments(corpus, tmp_path, trainer__max_steps=2), *last_checkpoint_every(1)]
    main([*args, "--trainer.max_time=00:01:00:00"])
    assert "max_time" not in capsys.readouterr().out
    main([*args, "--ckpt_path=last", "--trainer.max_steps=3", "--trainer.max_time=00:00:00:00"])
    assert (
        "trainer.max_time=00:00:00:00 is used up, at step 2. To go on, raise it and pass "
        "--ckpt_path last."
    ) in capsys.readouterr().out


def test_another_optimizer_than_the_checkpoints_is_one_clear_error(corpus, tmp_path, capsys):
    args = ["fit", *arguments(corpus, tmp_path, trainer__max_steps=1), *last_checkpoint_every(1)]
    main(args)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        # Before any data is read.
        main(
            [
                *args,
                "--ckpt_path=last",
                "--model.optimization.optimizer=muon",
                "--data.source=nowhere",
            ]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert (
        "got model.optimization.optimizer='muon' and a checkpoint of optimizer='adamw'. Pass "
        "--model.optimization.optimizer adamw"
    ) in error
    assert "Traceback" not in error
    assert contents(tmp_path) == before


def test_last_points_at_the_run_before(corpus, tmp_path, capsys):
    write_run(tmp_path / "previous", has_checkpoint=True)
    main(["fit", *arguments(corpus, tmp_path, trainer__max_steps=1), "--ckpt_path=last"])
    out = capsys.readouterr().out
    assert f"No checkpoint in {tmp_path} yet: starting from new weights." in out
    path = tmp_path / "previous" / "checkpoints" / "last.ckpt"
    assert f"The run before has one: {path}" in out


def test_one_callback_needs_no_list(corpus, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("trainer:\n  callbacks: {class_path: recipes.callbacks.LastCheckpoint}\n")
    args = arguments(corpus, tmp_path / "run", trainer__max_steps=1)
    main(["fit", f"--config={config}", *args])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_false_start_does_not_push_out_a_run_with_weights(tmp_path):
    write_run(tmp_path / "previous", has_checkpoint=True)
    write_run(tmp_path, has_checkpoint=False)
    told = make_room(tmp_path, ckpt_path=None)
    assert told == (
        f"The run before had no checkpoint and is gone; {tmp_path / 'previous'} stays as it is."
    )
    assert (tmp_path / "previous" / "checkpoints" / "last.ckpt").read_text() == "weights"
    assert not (tmp_path / "metrics.csv").exists()


def test_resuming_the_run_in_previous_is_refused(tmp_path):
    write_run(tmp_path / "previous", has_checkpoint=True)
    write_run(tmp_path, has_checkpoint=True)
    path = tmp_path / "previous" / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"resumes in its own folder.*Move\s+that folder"):
        check_resumed_folder(tmp_path, ckpt_path=path)
    assert path.exists()


def test_positions_of_the_report_are_checked_before_training(corpus, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[ReportCallback(short_context=65)])
    task = TextLM(model_options=model_options())
    with pytest.raises(ValueError, match="short_context"):
        trainer.fit(task, datamodule=make_data(corpus))
    assert trainer.global_step == 0


def test_time_of_the_report_adds_up_over_a_resumption():
    first, second = ReportCallback(), ReportCallback()
    first._start -= 100.0
    second.load_state_dict(first.state_dict())
    assert second.seconds == pytest.approx(100.0, abs=10.0)


def test_file_names_need_not_be_utf8():
    key = os.fsdecode(b"caf\xe9.py")
    assert split_of(key, val_fraction=0.5, test_fraction=0.0) in ("train", "val")


def test_what_lightning_refuses_is_one_line(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments(corpus, tmp_path, trainer__val_check_interval=-1)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "val_check_interval" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_stream_is_one_line(corpus, tmp_path, capsys, workers):
    rows = [json.dumps({"text": f"row {i} " * 20}) for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, '{"text": "cut', *rows]))
    options = {"source": path, "val_source": corpus, "on_error": "raise", "num_workers": workers}
    changes = {f"data__{name}": value for name, value in options.items()}
    args = arguments(corpus, tmp_path / "run", **changes, data__streaming="{shuffle_windows: 2}")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--data.test_fraction=0"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: on_error='raise' stops at what cannot be read, got {path}: ")
    assert "row 20: Unterminated string" in error
    assert error.endswith(")")


def test_a_bug_in_a_worker_keeps_its_traceback(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.text_streaming.read_documents", lambda *args, **options: 1 / 0)
    changes = {"data__streaming": True, "data__num_workers": 1}
    with pytest.raises(ZeroDivisionError, match="in DataLoader worker process"):
        main(["fit", *arguments(corpus, tmp_path, **changes, trainer__limit_val_batches=0)])


def test_a_terminated_run_has_a_status_that_says_so(corpus, tmp_path, monkeypatch, capsys):
    def stop_here(task, optimizer):
        if task.trainer.global_step == 4:
            raise SIGTERMException

    monkeypatch.setattr(TextLM, "on_before_zero_grad", stop_here)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments(corpus, tmp_path), *last_checkpoint_every(3)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "--ckpt_path last" in capsys.readouterr().out


def test_positions_without_text_have_no_figure():
    nats, num_bytes = torch.zeros(64).double(), torch.zeros(64).double()
    nats[:8], num_bytes[:8] = math.log(2) * 3, 1
    curve = ContextCurve(nats=nats, num_bytes=num_bytes)
    figures = ContextFigures(
        full=curve, short=curve, short_context=4, near=2, far=16, num_windows=1
    )
    assert figures.to_dict()["first_2"] == pytest.approx(3.0)
    assert figures.to_dict()["beyond_16"] is None
    json.dumps(figures.to_dict(), allow_nan=False)
    assert draw_report(title="t", curves={}, figures=figures).startswith(b"\x89PNG")
