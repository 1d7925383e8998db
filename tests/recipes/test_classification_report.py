import json

import pytest
import torch

from recipes.classification_metrics import class_scores
from recipes.classification_report import ClassificationReport, class_table
from recipes.optimization import OptimizationConfig
from tests.recipes.classification_runs import PointData, Points, quiet_trainer
from tests.recipes.test_classification import quiet_loaders  # noqa: F401 - a fixture

COUNTS = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 4]])


def test_scores_are_recall_and_precision_of_each_class():
    scores = class_scores(COUNTS, ("cat", "dog", "cow"))
    assert scores["cat"] == {"samples": 4, "recall": 0.75, "precision": pytest.approx(0.6)}
    assert scores["dog"] == {"samples": 0, "recall": None, "precision": 0.0}
    assert scores["cow"]["precision"] == 1.0


def test_table_can_be_read():
    assert class_table(COUNTS, ("cat", "dog", "a cow")).splitlines() == [
        "class  samples  recall  precision",
        "cat          4   75.0%      60.0%",
        "dog          0       -       0.0%",
        "a cow        6   66.7%     100.0%",
    ]


def fit(tmp_path, data, report=None, **options):
    report = ClassificationReport(title="Points") if report is None else report
    trainer = quiet_trainer(tmp_path, callbacks=[report], **options)
    task = Points(optimization=OptimizationConfig(lr=0.1))
    trainer.fit(task, datamodule=data)
    return task


def test_report_is_of_the_test_samples(tmp_path, capsys):
    class Data(PointData):
        def test_dataloader(self):
            return torch.utils.data.DataLoader(self.samples[:6], batch_size=4)

    task = fit(tmp_path, Data(), max_epochs=4)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["metrics"]["test_accuracy"] == task.figures["test"]["accuracy"] == 1.0
    assert record["test_confusion"] == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    assert record["metrics"]["steps"] == 32
    assert task.training
    out = capsys.readouterr().out
    assert "red          2  100.0%     100.0%" in out
    assert "Test: loss" in out
    # Without a logger there are no curves.
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(("limit", "samples"), [(2, 8), (0.5, 16), (1.0, 30)])
def test_report_respects_the_limit_of_the_trainer(tmp_path, limit, samples):
    task = fit(tmp_path, PointData(), limit_test_batches=limit)
    assert int(task.confusions["test"].sum()) == samples


def test_without_test_samples_it_is_of_the_last_validation(tmp_path, capsys):
    data = PointData()
    data.has_test = False
    fit(tmp_path, data)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert sum(map(sum, record["val_confusion"])) == 30
    assert "Validation: loss" in capsys.readouterr().out


def test_nothing_held_out_gives_no_report(tmp_path, capsys):
    data = PointData()
    data.has_test = False
    fit(tmp_path, data, limit_val_batches=0)
    assert "No report: nothing that is held out" in capsys.readouterr().out
    assert not (tmp_path / "metrics.json").exists()


def test_a_quick_try_leaves_nothing_behind(tmp_path):
    fit(tmp_path / "run", PointData(), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


def test_time_goes_on_in_a_resumed_run():
    report = ClassificationReport()
    report.load_state_dict({"seconds": 100.0})
    assert 100 <= report.state_dict()["seconds"] < 110
