import dataclasses
import math
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F

import longnet_zoo as lz
from recipes.classification import (
    UNLABELLED,
    ClassificationTask,
)
from recipes.classification_metrics import ClassificationMetrics, confusion_scores
from recipes.classifiers import changed_options, create_classifier
from recipes.optimization import OptimizationConfig
from tests.recipes.classification_runs import PointData, Points, quiet_trainer, tiny_vit


@pytest.fixture(autouse=True)
def quiet_loaders():
    with warnings.catch_warnings():
        # The toy data is in memory.
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        # Lightning 2.6 and newer PyTorch.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.")
        yield


def area_under_curve(scores, is_positive):
    """Returns how often a positive sample has a higher score than a negative one."""
    wins = [
        (p > n) + 0.5 * (p == n)
        for p, a in zip(scores, is_positive, strict=True)
        if a
        for n, b in zip(scores, is_positive, strict=True)
        if not b
    ]
    return sum(wins) / len(wins)


def test_metrics_are_those_of_all_samples_together():
    logits, labels = torch.randn(23, 4), torch.randint(0, 3, (23,))
    metrics = ClassificationMetrics(4)
    for part in (slice(0, 7), slice(7, 8), slice(8, 23)):
        metrics.update(logits[part], labels[part])
    figures, counts = metrics.compute()
    guess = logits.argmax(1)
    assert int(counts.sum()) == 23
    assert int(counts[1, 2]) == int(((labels == 1) & (guess == 2)).sum())
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-6)
    assert figures["accuracy"] == pytest.approx(float((guess == labels).float().mean()))
    recalls = [float((guess[labels == c] == c).float().mean()) for c in range(3)]
    assert figures["balanced_accuracy"] == pytest.approx(sum(recalls) / 3)
    # Class 3 does not occur, so it has no curve.
    probabilities = logits.softmax(1)
    areas = [
        area_under_curve(probabilities[:, c].tolist(), (labels == c).tolist()) for c in range(3)
    ]
    assert figures["auroc"] == pytest.approx(sum(areas) / 3, abs=1e-5)


def test_metrics_leave_out_what_is_not_defined():
    metrics = ClassificationMetrics(2)
    assert metrics.compute()[0] == {}
    metrics.update(torch.randn(2, 2), torch.full((2,), UNLABELLED))
    assert metrics.compute()[0] == {}
    # A single class has no ROC curve.
    metrics.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, UNLABELLED]))
    figures, counts = metrics.compute()
    assert set(figures) == {"loss", "accuracy", "balanced_accuracy"}
    assert counts.tolist() == [[1, 0], [0, 0]]
    metrics.reset()
    assert metrics.compute()[0] == {}


def test_balanced_accuracy_is_the_mean_recall_of_classes_that_occur():
    scores = confusion_scores(torch.tensor([[9, 1, 0], [1, 1, 0], [0, 0, 0]]))
    assert scores["accuracy"] == pytest.approx(10 / 12)
    assert scores["balanced_accuracy"] == pytest.approx((0.9 + 0.5) / 2)


def test_loss_weighs_smooths_and_takes_soft_targets():
    task = Points(class_weights=[1, 2, 5], label_smoothing=0.1)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, UNLABELLED])
    kept = slice(0, 5)
    target = F.one_hot(labels[kept], 3) * 0.9 + 0.1 / 3
    weights = torch.tensor([1.0, 2.0, 5.0])
    terms = -(target * weights * logits[kept].log_softmax(1)).sum(1)
    expected = terms.sum() / weights[labels[kept]].sum()
    torch.testing.assert_close(task.loss(logits, labels), expected)
    soft = torch.rand(6, 3).softmax(1)
    smooth = soft * 0.9 + 0.1 / 3
    expected = -(smooth * weights * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.loss(logits, soft), expected)


def test_balanced_weights_are_inverse_to_the_training_samples(tmp_path):
    task = Points(class_weights="balanced")
    data = PointData(labels=[0] * 8 + [1] * 4 + [2] * 12)
    quiet_trainer(tmp_path, max_epochs=1).fit(task, datamodule=data)
    torch.testing.assert_close(task.loss_weights, torch.tensor([1.0, 2.0, 2 / 3]))


def test_it_learns_and_logs_everything(tmp_path):
    task = Points(optimization=OptimizationConfig(lr=0.1))
    trainer = quiet_trainer(tmp_path, max_epochs=4)
    trainer.fit(task, datamodule=PointData())
    logged = trainer.callback_metrics
    assert {"train_loss", "lr", "grad_norm", "samples_per_second", "val_auroc"} <= set(logged)
    assert float(logged["val_accuracy"]) == task.figures["val"]["accuracy"] == 1.0
    assert float(logged["val_balanced_accuracy"]) == 1.0
    assert task.confusions["val"].tolist() == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert {p.name for p in tmp_path.iterdir()} == {"val_confusion.png", "pattern.png"}
    trainer.test(task, datamodule=PointData(), verbose=False)
    assert float(trainer.callback_metrics["test_accuracy"]) == 1.0
    assert (tmp_path / "test_confusion.png").exists()


def test_accumulated_batches_are_logged_as_one_step(tmp_path):
    class Losses(L.Callback):
        def __init__(self):
            self.batches, self.steps = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.batches.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
            self.steps.append(float(trainer.callback_metrics.get("train_loss", math.nan)))

    losses = Losses()
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[losses])
    trainer.fit(Points(), datamodule=PointData())
    assert trainer.global_step == 4
    assert losses.steps[1] == pytest.approx(sum(losses.batches[:2]) / 2, rel=1e-5)
    assert losses.steps[3] == pytest.approx(sum(losses.batches[2:4]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        # 30 points in batches of 4 are 8 batches, so 4 steps of two.
        ({"max_epochs": 5}, (20, 6)),
        ({"max_epochs": 5, "max_steps": 11}, (11, 6)),
        ({"max_epochs": -1, "max_steps": 11}, (11, 6)),
        ({"max_epochs": 5, "limit_train_batches": 3}, (10, 3)),
        ({"max_epochs": 5, "limit_train_batches": 0.5}, (10, 3)),
    ],
)
def test_schedule_ends_with_the_run_and_warms_up_by_epochs(tmp_path, trainer, expected):
    task = Points(warmup_epochs=1.5, optimization=OptimizationConfig(lr=1.0))
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0, **trainer}
    runner = quiet_trainer(tmp_path, **options)
    runner.fit(task, datamodule=PointData())
    factor = task.lr_schedulers().lr_lambdas[0]
    total, warmup = expected
    assert factor(0) == pytest.approx(1 / warmup)
    assert factor(warmup - 1) == 1.0
    assert factor(total) == 0.0
    assert factor(total - 1) > 0.0
    assert runner.global_step == total


def test_a_run_without_an_end_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match="got decay_steps=None and a run without a number"):
        trainer.fit(Points(), datamodule=PointData())


def test_predict_prints_name_class_and_probability(tmp_path, capsys):
    task = Points()
    with torch.no_grad():
        task.model.weight.zero_()
        task.model.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    data = PointData(labels=[0, 2, UNLABELLED])
    (rows,) = quiet_trainer(tmp_path).predict(task, datamodule=data)
    probability = math.e / (math.e + 2)
    assert [row[:2] for row in rows] == [("point 0", "green"), ("point 1", "green")]
    assert rows[0][2] == pytest.approx(probability)
    assert capsys.readouterr().out == "".join(f"point {i}\tgreen\t0.576\n" for i in (0, 1))


def test_class_names_come_from_the_checkpoint_where_the_data_has_none(tmp_path):
    task = Points()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, datamodule=PointData())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    trainer = quiet_trainer(tmp_path)
    rows = trainer.predict(
        Points(), datamodule=PointData(classes=None), ckpt_path=tmp_path / "a.ckpt"
    )
    assert {row[1] for batch in rows for row in batch} <= {"red", "green", "blue"}
    assert Points().shown_class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match="got red green blue and blue green red"):
        trainer.test(
            Points(),
            datamodule=PointData(classes=("blue", "green", "red")),
            ckpt_path=tmp_path / "a.ckpt",
        )


def test_other_number_of_classes_is_refused(tmp_path):
    data = PointData(classes=("a", "b"))
    with pytest.raises(ValueError, match=r"num_classes=3 and data with 2: a, b.*num_classes 2"):
        quiet_trainer(tmp_path).fit(Points(), datamodule=data)


def test_checkpoint_of_another_optimizer_or_model_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(Points(), datamodule=PointData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = Points(optimization=OptimizationConfig(optimizer="muon"))
    with pytest.raises(ValueError, match="optimizer='muon' and a checkpoint of optimizer='adamw'"):
        quiet_trainer(tmp_path).fit(other, datamodule=PointData(), ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"mis-shaped: model.weight: model \(4, 2\)"):
        quiet_trainer(tmp_path).test(
            Points(num_classes=4),
            datamodule=PointData(classes=None),
            ckpt_path=tmp_path / "a.ckpt",
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be 2 or more, got 1"),
        ({"class_weights": [1.0, 2.0]}, r"got \[1.0, 2.0\] and num_classes=3"),
        ({"class_weights": [1, 2, -1]}, r"finite and above 0, got \[1, 2, -1\]"),
        ({"class_weights": [0, 0, 0]}, r"finite and above 0, got \[0, 0, 0\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"warmup_epochs": -1.0}, "warmup_epochs=-1.0 and warmup_steps=0"),
        (
            {"warmup_epochs": 1.0, "optimization": OptimizationConfig(warmup_steps=5)},
            "warmup_epochs=1.0 and warmup_steps=5",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Points(**options)


@pytest.mark.parametrize("name", ["logits", "labels", "names"])
def test_a_task_must_say_what_is_in_a_batch(name):
    task = ClassificationTask(num_classes=2)
    with pytest.raises(NotImplementedError, match=rf"ClassificationTask must define {name}\(batch"):
        getattr(task, name)({})


def test_progress_shows_losses_accuracy_and_speed():
    text = Points().progress_text({"train_loss": 0.5, "lr": 1.0})
    assert text == "train loss 0.500"
    metrics = {"val_loss": 0.25, "val_accuracy": 0.91, "samples_per_second": 1234.0}
    assert Points().progress_text(metrics) == (
        "val loss 0.250  val accuracy 91.0%  1,234.0 samples/s"
    )


NAME = "longvit_tiny_patch8_64"


def test_weights_without_a_head_get_a_new_one():
    trained = lz.create_model(NAME, num_classes=0, **tiny_vit())
    model = create_classifier(
        NAME, num_classes=5, pretrained=trained.state_dict(), options=tiny_vit()
    )
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    torch.testing.assert_close(model.pos_embed, trained.pos_embed)


def test_weights_with_a_head_keep_it_or_get_another():
    trained = lz.create_model(NAME, num_classes=4, **tiny_vit())
    options = {**tiny_vit(), "num_classes": 4}
    same = create_classifier(NAME, num_classes=4, pretrained=trained.state_dict(), options=options)
    torch.testing.assert_close(same.head.weight, trained.head.weight)
    other = create_classifier(NAME, num_classes=3, pretrained=trained.state_dict(), options=options)
    assert other.head.weight.shape == (3, 16)


def test_changed_options_make_the_same_model_without_its_weights():
    model = create_classifier(NAME, num_classes=3, options={**tiny_vit(), "head_offset": "block"})
    options = changed_options(model, NAME)
    assert options["head_offset"] == "block"
    # As the command line writes them.
    assert options["segment_lengths"] == list(model.config.segment_lengths)
    assert "num_classes" not in options
    assert "eps" not in options
    again = lz.create_model(NAME, num_classes=3, **options)
    assert dataclasses.asdict(again.config) == dataclasses.asdict(model.config)


class _SaveCounts(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_test_end(self, trainer, pl_module):
        saved = {"figures": pl_module.figures["test"], "counts": pl_module.confusions["test"]}
        torch.save(saved, self.folder / f"rank{trainer.global_rank}.pt")


class _UnevenData(PointData):
    """The second process sees samples without a label only."""

    def test_dataloader(self):
        samples = self.samples
        if self.trainer.global_rank == 1:
            samples = [{**sample, "labels": UNLABELLED} for sample in samples]
        return torch.utils.data.DataLoader(samples, batch_size=15)


@pytest.mark.slow
@pytest.mark.distributed
def test_confusion_is_summed_over_processes(tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(tmp_path, callbacks=[_SaveCounts(tmp_path)], **options)
        trainer.test(Points(), datamodule=_UnevenData(), verbose=False)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["figures"] == ranks[1]["figures"]
    assert "auroc" in ranks[0]["figures"]
    assert int(ranks[0]["counts"].sum()) == int(ranks[1]["counts"].sum()) == 30
