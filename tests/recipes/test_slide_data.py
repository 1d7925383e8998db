from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recipes.slide_classification import SlideClassifier
from recipes.slide_data import SlideDataModule
from recipes.slide_demo import DEMO_CLASSES
from tests.recipes.classification_runs import quiet_trainer
from tests.recipes.slide_runs import (
    CLASSES,
    DIM,
    draw_slide,
    tiny_encoder,
    write_labels,
    write_slides,
)


@pytest.fixture
def options(tmp_path):
    source = write_slides(tmp_path / "slides")
    return {"source": str(source), "labels": str(write_labels(tmp_path / "labels.csv"))}


def names(loader):
    return [name for batch in loader for name in batch["names"]]


def test_a_folder_gives_batches_of_each_split(options):
    data = SlideDataModule(**options, batch_size=2)
    data.setup("fit")
    assert (data.class_names, data.input_dim, data.class_counts) == (CLASSES, DIM, [3, 3])
    train = data.train_dataloader()
    assert len(train) == 3
    assert sorted(names(train)) == [f"slide_{i:02d}" for i in range(6)]
    assert names(data.val_dataloader()) == ["slide_06", "slide_07", "slide_08"]
    assert names(data.test_dataloader()) == ["slide_09", "slide_10", "slide_11"]
    assert names(data.predict_dataloader()) == names(data.test_dataloader())


def test_training_takes_at_most_max_tiles_and_evaluation_all(options):
    data = SlideDataModule(**options, max_tiles=6)
    data.setup("fit")
    assert {batch["tiles"].shape[1] for batch in data.train_dataloader()} == {6}
    assert {batch["tiles"].shape[1] for batch in data.val_dataloader()} == {7, 9, 10}


def test_a_sample_is_spread_over_the_training_slides(options):
    data = SlideDataModule(**options)
    data.setup("fit")
    assert names(data.sample_dataloader(3)) == ["slide_00", "slide_02", "slide_04"]
    assert len(names(data.sample_dataloader(100))) == 6


def test_the_demo_needs_no_files():
    data = SlideDataModule(batch_size=4)
    data.setup("fit")
    assert (data.class_names, data.input_dim) == (DEMO_CLASSES, 27)
    batch = next(iter(data.val_dataloader()))
    assert batch["tiles"].shape[::2] == (4, 27)
    assert len(set(data.class_counts)) == 1


def test_slides_to_predict_need_no_labels(options):
    data = SlideDataModule(predict_source=options["source"])
    data.setup("predict")
    assert len(names(data.predict_dataloader())) == 12


def spoil(source, number, *, dim=DIM, scale=1.0, tile=1.0):
    """Writes another embedding size, coordinates or tile values into a slide."""
    tiles, coords = draw_slide(number, num_tiles=8, dim=dim)
    path = Path(source) / f"slide_{number:02d}.safetensors"
    save_file({"features": tiles * tile, "coords": coords * scale}, path)


def test_a_run_skips_what_it_cannot_use_and_names_it(options, tmp_path, caplog):
    nan = torch.nan
    for number, fault in {
        **{0: {"tile": nan}, 6: {"dim": 3}, 7: {"tile": nan}},
        **{10: {"scale": 0.25}, 11: {"tile": nan}},
    }.items():
        spoil(options["source"], number, **fault)
    task = SlideClassifier(model_options=tiny_encoder())
    data = SlideDataModule(**options, on_error="skip", batch_size=3)
    trainer = quiet_trainer(tmp_path / "run")
    trainer.fit(task, data)
    trainer.test(task, data)
    for number in (0, 6, 7, 10, 11):
        assert f"slide_{number:02d}.safetensors" in caplog.text
    assert int(task.confusions["val"].sum()) == int(task.confusions["test"].sum()) == 1
    data = SlideDataModule(predict_source=options["source"], on_error="skip", batch_size=3)
    rows = [row for batch in trainer.predict(task, data) for row in batch]
    assert [row[0] for row in rows] == [f"slide_{i:02d}" for i in (1, 2, 3, 4, 5, 8, 9)]
    data = SlideDataModule(predict_source=options["source"])
    with pytest.raises(ValueError, match=r"2 of 12 slides .*slide_10.*; .*slide_06.*reads 5"):
        trainer.predict(task, data)


def test_a_run_stops_at_a_slide_by_its_file(options, tmp_path):
    spoil(options["source"], 4, tile=torch.inf)
    data = SlideDataModule(**options, batch_size=3)
    task = SlideClassifier(model_options=tiny_encoder())
    with pytest.raises(ValueError, match=r"slide_04\.safetensors: tiles must be finite.* skip"):
        quiet_trainer(tmp_path / "run").fit(task, data)


def test_without_held_out_slides_validation_is_empty_and_the_test_refused(options, tmp_path):
    write_labels(tmp_path / "labels.csv", split=None)
    data = SlideDataModule(**options, val_fraction=0, test_fraction=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"the test needs slides.* test_fraction=0\. Hold some"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"max_tiles": 0}, "max_tiles must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"for training, got 0\.5 and 0\.5"),
        ({"val_fraction": -0.1}, r"val_fraction must be in \[0, 1\), got -0\.1"),
        ({"on_error": "ignore"}, "on_error must be 'skip' or 'raise', got 'ignore'"),
        ({"source": "slides"}, "got source='slides' and labels=None"),
        ({"labels": "a.csv"}, r"got source='demo' and labels='a\.csv'"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SlideDataModule(**changes)
