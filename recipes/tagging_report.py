"""Tests a tagger when training ends."""

import lightning as L

from recipes.callbacks import RunClock, Throughput
from recipes.classification_report import evaluate_test
from recipes.run_folder import run_lines, update_record

__all__ = ["TaggingReport"]


class TaggingReport(RunClock):
    """Tests the model when training ends, so that the task reports on the test.

    Where nothing is held out for the test, the task reports on the last validation.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tests on all processes; writes steps and time on the first."""
        if trainer.fast_dev_run:
            return
        evaluate_test(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        metrics = {
            "steps": trainer.global_step,
            "train_seconds": round(throughput.train_seconds, 1),
            "total_seconds": round(self.seconds, 1),
        }
        update_record(trainer.default_root_dir, metrics=metrics)
        print("\n".join(run_lines(trainer, metrics, ["pattern.png"])))
