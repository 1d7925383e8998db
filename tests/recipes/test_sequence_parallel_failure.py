"""A process that fails ends the job on all, and torchrun goes on from the last checkpoint."""

import json

import pytest

from recipes import text_lm
from tests.parallel.torchrun import torchrun
from tests.recipes.sequence_parallel_runs import strategy, text_run
from tests.recipes.test_sequence_parallel import fit_alone
from tests.recipes.text_runs import curve, last_checkpoint_every

MISFORTUNE = "tests.recipes.sequence_parallel_runs.Misfortune"
COLLECTIVE_TIMEOUT_S = 6


def run_with(corpus, folder, plan):
    """Runs on two processes, of which the second fails as planned at each start."""
    _, recipe, args = text_run(
        corpus,
        folder,
        "shared",
        *strategy(2, timeout=f"0:00:0{COLLECTIVE_TIMEOUT_S}"),
        *last_checkpoint_every(5),
        f"--trainer.callbacks+={MISFORTUNE}",
        "--trainer.callbacks.rank=1",
        f"--trainer.callbacks.plan={json.dumps(plan)}",
        "--ckpt_path=last",
        trainer__devices=2,
    )
    return torchrun(
        ["-m", recipe, *args],
        world_size=2,
        options=["--max-restarts=1"],
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


@pytest.mark.distributed
def test_a_killed_process_ends_all_and_the_job_goes_on_from_the_last_checkpoint(corpus, tmp_path):
    done = run_with(corpus, tmp_path, ["kill 7"])
    assert done.returncode == 0, done.stdout
    assert "No checkpoint in" in done.stdout
    assert done.stdout.count("Restored all states from the checkpoint at") == 1
    assert (tmp_path / "shared/checkpoints/last.ckpt").is_dir()
    fit_alone(text_lm, text_run(corpus, tmp_path, "alone", trainer__devices=1))
    expected = curve(tmp_path / "alone", "train_loss")
    assert curve(tmp_path / "shared", "train_loss") == pytest.approx(expected, abs=1e-4)


@pytest.mark.distributed
def test_an_error_or_a_process_that_hangs_ends_the_job_with_its_reason(corpus, tmp_path):
    done = run_with(corpus, tmp_path, ["raise 3", "hang 2"])
    assert done.returncode == 1, done.stdout
    assert "KeyError: 'misfortune of rank 1 at step 3'" in done.stdout
    assert f"Timed out waiting {COLLECTIVE_TIMEOUT_S}000ms" in done.stdout
    # In the summary, of the process that failed first.
    assert "Root Cause" in done.stdout
    assert "error_file: <N/A>" not in done.stdout.split("Root Cause")[1]
