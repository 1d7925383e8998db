"""Which batches a Trainer goes through."""

import math
from types import SimpleNamespace

import pytest
import torch

from recipes.callbacks import SkippedSamples
from recipes.trainer_batches import held_out, limited, run_steps, steps_per_epoch


def trainer(**options):
    batch = {"x": torch.zeros(4), "num_skipped": torch.tensor(2)}
    data = SimpleNamespace(
        train_dataloader=lambda: [batch] * 10,
        val_dataloader=lambda: [batch] * 5,
        test_dataloader=lambda: [batch] * 3,
    )
    strategy = SimpleNamespace(
        batch_to_device=lambda batch: {**batch, "is_moved": True},
        reduce=lambda sums, reduce_op: sums,
    )
    defaults = {
        "datamodule": data,
        "strategy": strategy,
        "callbacks": [SkippedSamples(unit="pairs", count=lambda batch: len(batch["x"]))],
        "max_steps": -1,
        "max_epochs": -1,
        "accumulate_grad_batches": 3,
        "limit_train_batches": 1.0,
        "limit_val_batches": 2,
        "limit_test_batches": 0.7,
        "is_global_zero": True,
        "sanity_checking": False,
    }
    return SimpleNamespace(**(defaults | options))


def test_a_run_ends_by_steps_or_epochs_whichever_comes_first():
    assert run_steps(trainer()) == math.inf
    assert run_steps(trainer(max_steps=7)) == 7
    assert run_steps(trainer(max_epochs=2)) == 8
    assert run_steps(trainer(max_epochs=2, max_steps=7)) == 7
    assert run_steps(trainer(max_epochs=2, limit_train_batches=3)) == 2
    assert steps_per_epoch(trainer(limit_train_batches=0.5)) == 2


@pytest.mark.parametrize(("limit", "number"), [(2, 2), (9, 5), (0.5, 2), (1.0, 5), (0, 0)])
def test_an_int_limits_batches_and_a_float_their_share(limit, number):
    assert len(list(limited([None] * 5, limit))) == number


def test_held_out_batches_are_limited_moved_and_counted(capsys):
    run = trainer()
    batches = list(held_out(run, "val"))
    assert len(batches) == 2
    assert all(batch["is_moved"] for batch in batches)
    run.callbacks[0].on_fit_end(run, None)
    assert capsys.readouterr().out == ""
    assert len(list(held_out(run, "test", counts_skipped=True))) == 2
    run.callbacks[0].on_fit_end(run, None)
    assert capsys.readouterr().out == "skipped 4 of 8 pairs in test; the log says which\n"
