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
        *last_checkpoint_every(3),
        f"--trainer.callbacks+={MISFORTUNE}",
        "--trainer.callbacks.rank=1",
        f"--trainer.callbacks.plan={json.dumps(plan)}",
        "--ckpt_path=last",
        trainer__devices=2,
    )
    return torchrun(
        ["-m", recipe, *args],
        world_size=2,
        options=[f"--max-restarts={len(plan)}"],
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


@pytest.mark.distributed
def test_a_job_outlives_a_process_that_hangs_and_one_that_is_killed(corpus, tmp_path):
    done = run_with(corpus, tmp_path, ["hang 1", "kill 5"])
    assert done.returncode == 0, done.stdout
    assert f"Timed out waiting {COLLECTIVE_TIMEOUT_S}000ms" in done.stdout
    # The process that hung left no checkpoint, the one that was killed that of step 3.
    assert done.stdout.count("No checkpoint in") == 2
    assert done.stdout.count("Restored all states from the checkpoint at") == 1
    assert (tmp_path / "shared/checkpoints/last.ckpt").is_dir()
    fit_alone(text_lm, text_run(corpus, tmp_path, "alone", trainer__devices=1))
    expected = curve(tmp_path / "alone", "train_loss")
    assert curve(tmp_path / "shared", "train_loss") == pytest.approx(expected, abs=1e-4)


def test_an_error_is_recorded_for_the_summary_of_torchrun(corpus, tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    more = [f"--trainer.callbacks+={MISFORTUNE}", "--trainer.callbacks.rank=0"]
    more.append('--trainer.callbacks.plan=["raise 1"]')
    with pytest.raises(KeyError, match="misfortune of rank 0 at step 1"):
        fit_alone(text_lm, text_run(corpus, tmp_path, "run", *more, trainer__devices=1))
    assert "misfortune of rank 0 at step 1" in json.loads(file.read_text())["message"]["message"]
