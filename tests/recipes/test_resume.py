"""A run that is killed and resumed is the run that was never killed."""

import os
import signal

import pytest
import torch

from recipes.cli import run
from recipes.text_data import TextDataModule
from recipes.text_lm import TextLM
from tests.forked import fork
from tests.recipes.text_runs import (
    arguments,
    curve,
    last_checkpoint_every,
    read_rows,
)


class Killed(TextLM):
    """Kills its process as `kill -9` would: nothing is flushed, no handler runs."""

    def on_train_batch_end(self, *args):
        if self.trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


class Terminated(TextLM):
    """Gets a real SIGTERM in the first of the three batches of optimizer step 4."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 12:
            os.kill(os.getpid(), signal.SIGTERM)


class PowerCut(Exception):
    """Stands for whatever ends a run."""


def fit(corpus, run_dir, *more, every=3, task=TextLM, **changes):
    args = [*arguments(corpus, run_dir, **changes), *last_checkpoint_every(every), *more]
    run(task, TextDataModule, args=["fit", *args])


def fit_until(step, monkeypatch, *args, **changes):
    """Runs until an exception in the middle of optimizer step `step` (from 0)."""

    def cut(task, optimizer):
        if task.trainer.global_step == step:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(TextLM, "on_before_zero_grad", cut)
        with pytest.raises(PowerCut):
            fit(*args, **changes)


def fit_elsewhere(folder, *args, **changes):
    """Runs in a process of its own; returns how that ended."""
    return fork(folder, fit, *args, **changes)


def assert_same_rows(got_dir, expected_dir, *, ignore=()):
    got, expected = read_rows(got_dir, ignore=ignore), read_rows(expected_dir, ignore=ignore)
    assert [sorted(row) for row in got] == [sorted(row) for row in expected]
    for got_row, expected_row in zip(got, expected, strict=True):
        for name, value in expected_row.items():
            if value == "" or got_row[name] == "":
                assert got_row[name] == value, (name, got_row, expected_row)
            else:
                assert float(got_row[name]) == pytest.approx(float(value), abs=1e-6), name


def test_sigkill_mid_epoch_then_last_equals_an_unbroken_run(corpus, tmp_path):
    fit(corpus, tmp_path / "whole")
    killed = fit_elsewhere(tmp_path, corpus, tmp_path / "killed", task=Killed)
    assert killed.status == -signal.SIGKILL, killed.said
    # Rows of steps 6 and 7 lie behind the checkpoint of step 6 and come again.
    assert max(curve(tmp_path / "killed", "train_loss")) == 6

    fit(corpus, tmp_path / "killed", "--ckpt_path=last")
    assert sorted(curve(tmp_path / "killed", "train_loss")) == list(range(12))
    assert_same_rows(tmp_path / "killed", tmp_path / "whole")


# The step that is saved validates, too, or not.
@pytest.mark.parametrize("interval", [15, 12])
def test_sigterm_saves_the_step_and_says_how_to_go_on(corpus, tmp_path, interval):
    changes = {"trainer__accumulate_grad_batches": 3, "trainer__val_check_interval": interval}
    fit(corpus, tmp_path / "whole", every=100, **changes)
    stopped = fit_elsewhere(
        tmp_path, corpus, tmp_path / "cut", every=100, task=Terminated, **changes
    )
    assert stopped.status == 128 + signal.SIGTERM, stopped.said
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert f"Resume {path} with --ckpt_path last." in stopped.said
    assert "Traceback" not in stopped.said
    assert torch.load(path, weights_only=True)["global_step"] == 5
    fit(corpus, tmp_path / "cut", "--ckpt_path=last", every=100, **changes)
    assert_same_rows(tmp_path / "cut", tmp_path / "whole")


def test_sigterm_has_its_old_handler_after_a_run(corpus, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(corpus, tmp_path, trainer__max_steps=1)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("every", "step", "changes"),
    [
        # The checkpoint coincides with a validation, which must not be repeated or lost.
        (5, 8, {}),
        # Three epochs of four batches: the checkpoint is the last batch of an epoch.
        (4, 6, {"trainer__limit_train_batches": 4}),
        (3, 7, {"trainer__accumulate_grad_batches": 3, "trainer__limit_train_batches": 9}),
        (3, 5, {"data__num_workers": 1, "model__optimization__decay": "cosine"}),
        # The context grows from 128 to 384 tokens over seven steps.
        (2, 5, {"data__seq_len": 384, "model__context_warmup": "{start: 128, steps: 7}"}),
        (3, 7, {"model__optimization__optimizer": "muon"}),
        (
            2,
            5,
            {
                "data__seq_len": 384,
                "model__context_warmup": "{start: 128, steps: 7}",
                "trainer__accumulate_grad_batches": 2,
            },
        ),
    ],
    ids=[
        *("validation", "end of an epoch", "accumulation", "worker", "context warm-up", "muon"),
        "accumulated context warm-up",
    ],
)
def test_resumed_run_equals_an_unbroken_one(corpus, tmp_path, monkeypatch, every, step, changes):
    fit(corpus, tmp_path / "whole", every=every, **changes)
    fit_until(step, monkeypatch, corpus, tmp_path / "cut", every=every, **changes)
    fit(corpus, tmp_path / "cut", "--ckpt_path=last", every=every, **changes)
    assert_same_rows(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("limit", [1.0, 5])
def test_a_finished_run_can_be_made_longer(corpus, tmp_path, limit):
    fit(corpus, tmp_path / "whole", trainer__limit_train_batches=limit)
    fit(corpus, tmp_path / "longer", trainer__limit_train_batches=limit, trainer__max_steps=7)
    fit(corpus, tmp_path / "longer", "--ckpt_path=last", trainer__limit_train_batches=limit)
    # Lightning counts the epoch in which max_steps stopped the first run as a whole one.
    assert_same_rows(tmp_path / "longer", tmp_path / "whole", ignore=["epoch"])


def test_a_run_with_a_seed_by_chance_goes_on_with_it(corpus, tmp_path):
    fit(corpus, tmp_path / "whole", "--seed_everything=3")
    fit(corpus, tmp_path / "longer", "--seed_everything=3", trainer__max_steps=5)
    fit(corpus, tmp_path / "longer", "--ckpt_path=last", "--seed_everything=true")
    assert_same_rows(tmp_path / "longer", tmp_path / "whole", ignore=["epoch"])


def test_dropout_of_a_step_does_not_depend_on_how_often_one_validates(corpus, tmp_path):
    fit(corpus, tmp_path / "often", trainer__val_check_interval=1)
    fit(corpus, tmp_path / "never", trainer__limit_val_batches=0)
    often, never = (curve(tmp_path / name, "train_loss") for name in ("often", "never"))
    assert often == never


def test_settings_of_the_resumed_run_win_over_the_checkpoint(corpus, tmp_path):
    fit(corpus, tmp_path, trainer__max_steps=6, model__optimization__lr=1e-3)
    fit(
        corpus,
        tmp_path,
        "--ckpt_path=last",
        model__optimization__lr=5e-3,
        model__optimization__weight_decay=0.5,
    )
    rates = curve(tmp_path, "lr")
    # decay_steps=20 and warmup_steps=2: the line falls from lr at step 2 to 0 at step 20.
    assert rates[5] == pytest.approx(1e-3 * (20 - 5) / 18)
    assert rates[6] == pytest.approx(5e-3 * (20 - 6) / 18)


def test_last_without_a_checkpoint_starts_from_the_beginning(corpus, tmp_path, capsys):
    fit(corpus, tmp_path, "--ckpt_path=last", trainer__max_steps=2)
    assert "No checkpoint in" in capsys.readouterr().out
    assert sorted(curve(tmp_path, "train_loss")) == [0, 1]
