"""The count of skipped samples; the other callbacks are tested with the recipes that use them."""

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from recipes.callbacks import SkippedSamples


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * 1

    def validation_step(self, batch, batch_idx):
        pass

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(*skipped):
    """Returns batches of 10 samples, of which or beside which some were skipped."""
    counts = [{} if number is None else {"num_skipped": torch.tensor(number)} for number in skipped]
    made = [{"x": torch.zeros(10), **count} for count in counts]
    return DataLoader(made, batch_size=None)


def run(stage, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[SkippedSamples(unit="images", count=lambda batch: len(batch["x"]))],
        max_epochs=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(trainer, stage)(Task(), **options)


def printed(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]


def test_a_training_ends_with_what_was_skipped(capsys):
    run("fit", train_dataloaders=batches(2, 0, 1), val_dataloaders=batches(0, 4))
    # Two epochs, in which other samples took the place of those that were skipped; validation is
    # what it was the last time.
    assert sorted(printed(capsys)) == [
        "skipped 4 of 20 images in validation; the log says which",
        "skipped 6 of 66 images in training; the log says which",
    ]


@pytest.mark.parametrize(
    ("stage", "name"), [("validate", "validation"), ("test", "test"), ("predict", "prediction")]
)
def test_an_evaluation_ends_with_what_was_skipped(capsys, stage, name):
    run(stage, dataloaders=batches(3, 1))
    assert printed(capsys) == [f"skipped 4 of 20 images in {name}; the log says which"]


def test_nothing_skipped_is_nothing_said(capsys):
    for loader in (batches(0, 0), batches(None, None)):
        run("fit", train_dataloaders=loader, val_dataloaders=loader)
    assert not printed(capsys)
