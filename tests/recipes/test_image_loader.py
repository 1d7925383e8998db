import logging
import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from recipes.classification_metrics import UNLABELLED
from recipes.image_files import ImageFiles, load_images
from recipes.image_loader import image_source
from recipes.sample_loader import EvalLoader, TrainLoader
from tests.recipes.classification_runs import write_images

NUMBER = 11


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 255, (NUMBER, 9, 9)).astype(np.uint8)
    names = tuple(f"image {i}" for i in range(NUMBER))
    return ImageFiles(
        names=names, labels=tuple(i % 3 for i in range(NUMBER)), pixels=pixels, max_pixels=81
    )


def random_transform():
    return create_transform(
        (3, 8, 8),
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.5,
        re_mode="pixel",
        interpolation="random",
    )


def plain_transform():
    return create_transform((3, 8, 8), crop_pct=1.0)


def train_loader(images, **options):
    defaults = {"batch_size": 3, "seed": 5}
    return TrainLoader(image_source(images, random_transform()), **(defaults | options))


def first(loader, number):
    """Returns batches across epochs."""
    found = []
    while len(found) < number:
        found += islice(iter(loader), number - len(found))
    return found


def same(a, b):
    return a["names"] == b["names"] and torch.equal(a["images"], b["images"])


def test_an_epoch_has_each_image_once_in_another_order(images):
    loader = train_loader(images)
    assert len(loader) == 3
    epochs = [[name for batch in loader for name in batch["names"]] for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    batch = next(iter(loader))
    assert batch["images"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [int(name.split()[1]) % 3 for name in batch["names"]]
    assert int(batch["num_skipped"]) == 0


def test_the_number_of_workers_changes_nothing(images):
    expected = first(train_loader(images), 5)
    found = first(train_loader(images, num_workers=2), 5)
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_augmentation_depends_on_seed_and_epoch(images):
    loader = train_loader(images, batch_size=NUMBER)
    by_name = [dict(zip(b["names"], b["images"], strict=True)) for b in first(loader, 2)]
    assert any(not torch.equal(by_name[0][n], by_name[1][n]) for n in by_name[0])
    assert not same(first(loader, 1)[0], first(train_loader(images, seed=6), 1)[0])


def test_augmentation_leaves_the_generators_alone(images):
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    first(train_loader(images), 2)
    assert draws() == expected


@pytest.mark.parametrize("position", [1, 3, 5])
def test_it_goes_on_where_it_was(images, position):
    whole = first(train_loader(images), 8)
    loader = train_loader(images)
    first(loader, position)
    resumed = train_loader(images, num_workers=1)
    resumed.load_state_dict(loader.state_dict())
    rest = first(resumed, 8 - position)
    assert all(same(a, b) for a, b in zip(whole[position:], rest, strict=True))


def test_ranks_share_an_epoch(images):
    both = [first(train_loader(images, rank=rank, world_size=2), 1)[0] for rank in (0, 1)]
    alone = first(train_loader(images, batch_size=6), 1)[0]
    assert both[0]["names"] + both[1]["names"] == alone["names"]
    assert torch.equal(torch.cat([both[0]["images"], both[1]["images"]]), alone["images"])


@pytest.mark.parametrize(("repeat", "number"), [(1, 1), (0.5, 2), (1.0, 3), (0.0, 5), (0, 5)])
def test_batches_can_be_repeated(images, repeat, number):
    names = [tuple(batch["names"]) for batch in first(train_loader(images, repeat=repeat), 5)]
    assert len(set(names)) == number
    assert names[:5] == (names[:number] * 5)[:5]


def test_an_epoch_without_a_step_is_refused(images):
    with pytest.raises(ValueError, match="batch_size=6 on 2 processes takes 12 images, got 11"):
        train_loader(images, batch_size=6, world_size=2)


def test_evaluation_has_each_image_once_and_a_fair_order(images):
    loader = EvalLoader(image_source(images, plain_transform()), batch_size=4)
    assert len(loader) == 3
    epochs = [[name for batch in loader for name in batch["names"]] for _ in range(2)]
    assert epochs[0] == epochs[1] != list(images.names)
    assert sorted(epochs[0]) == sorted(images.names)
    ordered = EvalLoader(
        image_source(images, plain_transform()), batch_size=4, places=range(len(images))
    )
    assert [name for batch in ordered for name in batch["names"]] == list(images.names)


def test_ranks_get_as_many_batches_and_fillers_do_not_count(images):
    ranks = [
        list(
            EvalLoader(image_source(images, plain_transform()), batch_size=2, rank=r, world_size=3)
        )
        for r in range(3)
    ]
    assert [len(rank) for rank in ranks] == [2, 2, 2]
    names = [name for rank in ranks for batch in rank for name in batch["names"]]
    assert sorted(names) == ["", *sorted(images.names)]
    labels = {
        name: label
        for rank in ranks
        for batch in rank
        for name, label in zip(batch["names"], batch["labels"].tolist(), strict=True)
    }
    assert labels.pop("") == UNLABELLED
    assert labels == dict(zip(images.names, images.labels, strict=True))
    assert all(int(batch["num_skipped"]) == 0 for rank in ranks for batch in rank)


@pytest.fixture
def damaged(tmp_path):
    folder = write_images(tmp_path, per_class=3)
    (folder / "green" / "01.png").write_bytes(b"cut")
    _, splits = load_images(str(folder), val_fraction=0.0, test_fraction=0.0, max_pixels=10**6)
    return splits["train"]


def test_damaged_image_is_replaced_in_training_and_logged(damaged, caplog):
    loader = TrainLoader(image_source(damaged, plain_transform()), batch_size=9, on_error="skip")
    (batch,) = loader
    assert int(batch["num_skipped"]) == 1
    names = [name.split("/", 1)[1] for name in batch["names"]]
    place = damaged.names.index(next(n for n in damaged.names if n.endswith("green/01.png")))
    following = damaged.names[place + 1]
    assert batch["names"].count(following) == 2
    assert not any(name.endswith("green/01.png") for name in names)
    assert torch.isfinite(batch["images"]).all()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "skipped: cannot read" in record.message
    assert "green/01.png" in record.message


def test_every_kind_of_unreadable_image_is_skipped_by_name(tmp_path, caplog):
    folder = write_images(tmp_path, per_class=2)
    Image.new("I;16", (4, 4)).save(folder / "red" / "deep.png")
    Image.new("L", (40, 40)).save(folder / "red" / "large.png")
    options = {"val_fraction": 0.0, "test_fraction": 0.0, "max_pixels": 20 * 23}
    images = load_images(str(folder), **options)[1]["train"]
    train = TrainLoader(image_source(images, plain_transform()), batch_size=8, on_error="skip")
    evaluation = EvalLoader(image_source(images, plain_transform()), batch_size=8, on_error="skip")
    for loader in (train, evaluation):
        caplog.clear()
        (batch,) = loader
        assert int(batch["num_skipped"]) == len(caplog.records) >= 2
        for name in ("deep.png", "large.png"):
            assert f"red/{name}" in caplog.text
            assert not any(found.endswith(name) for found in batch["names"])
    stop = EvalLoader(image_source(images, plain_transform()), batch_size=8)
    with pytest.raises(ValueError, match=r"red/(deep|large)\.png.* --data.on_error skip, which"):
        next(iter(stop))


def test_damaged_image_does_not_count_in_evaluation(damaged):
    loader = EvalLoader(image_source(damaged, plain_transform()), batch_size=5, on_error="skip")
    batches = list(loader)
    assert sum(int(batch["num_skipped"]) for batch in batches) == 1
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.tolist().count(UNLABELLED) == 1
    assert [name for batch in batches for name in batch["names"]].count("") == 1


def test_batch_of_damaged_images_alone_has_the_right_shape(damaged):
    place = next(i for i, name in enumerate(damaged.names) if name.endswith("green/01.png"))
    only = damaged.take([place])
    (batch,) = EvalLoader(image_source(only, plain_transform()), batch_size=1, on_error="skip")
    assert batch["images"].shape == (1, 3, 8, 8)
    loader = TrainLoader(image_source(only, plain_transform()), batch_size=1, on_error="skip")
    with pytest.raises(ValueError, match="none of the 1 training images can be read"):
        next(iter(loader))


@pytest.mark.parametrize("kind", [TrainLoader, EvalLoader])
def test_damaged_image_stops_a_run_that_says_so(damaged, kind):
    loader = kind(image_source(damaged, plain_transform()), batch_size=9, on_error="raise")
    with pytest.raises(ValueError, match=r"cannot read .*green/01.png.*--data.on_error skip"):
        next(iter(loader))


def test_large_image_passes_the_transform_whatever_pillows_limit(images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    assert first(train_loader(images), 1)[0]["images"].shape == (3, 3, 8, 8)
