"""What the captioning recipe reads."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.captioning_data import CaptionDataModule, DrawnPairs
from recipes.icons import COLOURS, Icon
from recipes.shard_sources import HeldOutShardConfig
from tests.recipes.captioning_runs import make_data, make_task, pairs, write_shard, write_table


def ready(data, stage="fit", **options):
    data.setup(stage, model=make_task(**options).model)
    return data


def test_batches_fit_the_model(tmp_path):
    data = ready(make_data(write_table(tmp_path / "table")))
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 3, 16, 16)
    assert batch["images"].min() >= -1
    assert batch["images"].max() <= 1
    texts = data.batch_tokenizer.decode(batch["tokens"])
    assert texts == batch["captions"]
    assert (data.has_test, data.word_groups) == (True, {})
    assert [len(batch["names"]) for batch in data.val_dataloader()] == [4]
    (test,) = data.test_dataloader()
    assert sorted(name[-7:] for name in test["names"]) == [f"{i:03d}.png" for i in (17, 19, 21, 23)]
    pixels = data.pixels(test["images"])
    assert pixels.shape == (4, 16, 16, 3)
    (red,) = (i for i, text in enumerate(test["captions"]) if "red" in text)
    torch.testing.assert_close(
        pixels[red].mean((0, 1)), torch.tensor([220.0, 30, 30]) / 255, atol=0.05, rtol=0
    )


class OneIcon:
    """Stands for icons, with a colour that the generator draws."""

    names, labels = ("a",), (0,)

    def read(self, place, *, generator=None):
        number = None if generator is None else int(generator.integers(1000))
        return Image.new("RGB", (4, 4)), f"{place} {number}"


def test_held_out_pairs_are_drawn_once_for_all():
    drawn = DrawnPairs(pairs=OneIcon())
    assert (drawn.names, drawn.labels) == (("a",), (0,))
    texts = [drawn.read(place)[1] for place in (0, 1, 0)]
    assert texts[0] == texts[2] != "0 None"
    assert texts[0].split()[1] != texts[1].split()[1]
    _, text = drawn.read(0, generator=np.random.default_rng(3))
    assert text == OneIcon().read(0, generator=np.random.default_rng(3))[1]


def test_held_out_icons_have_colours(monkeypatch):
    icon = Icon(name="n", caption="bell", concept="bell", font="f", character="c", image_id=0)
    icons = [dataclasses.replace(icon, name=f"n{i}") for i in range(40)]
    splits = {"train": icons, "val": icons, "test": icons}
    base = "recipes.image_text_data"
    monkeypatch.setattr(f"{base}.load_icons", lambda: icons)
    monkeypatch.setattr(f"{base}.split_icons", lambda *_, **__: splits)
    monkeypatch.setattr("recipes.image_text_sources.load_icons", lambda: icons)
    monkeypatch.setattr("recipes.image_text_sources.split_icons", lambda *_, **__: splits)

    def draw(icon, size, *, generator=None):
        has_colour = generator is not None and generator.random() < 0.5
        return Image.new("RGB", (size, size)), f"{'red ' * has_colour}{icon.caption}"

    monkeypatch.setattr("recipes.image_text_sources.render_icon", draw)
    data = ready(CaptionDataModule(batch_size=40))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        captions = [text for batch in loader for text in batch["captions"]]
        assert 10 < captions.count("red bell") < 30
        assert captions == [text for batch in loader for text in batch["captions"]]
    assert data.word_groups["colour"] == set(COLOURS)
    assert "bold" in data.word_groups["style"]
    assert CaptionDataModule(pages=2).word_groups == {}


def test_shards_hold_the_same_pairs(tmp_path, caplog):
    for name in ("train", "val", "test"):
        write_shard(tmp_path / f"{name}.tar", damaged=(1,) if name != "val" else ())
    shards = HeldOutShardConfig(
        val=str(tmp_path / "val.tar"),
        test=str(tmp_path / "test.tar"),
        batches_per_epoch=6,
        shuffle=0,
    )
    data = ready(make_data(tmp_path / "train.tar", shards=shards))
    with caplog.at_level(logging.WARNING):
        batches = list(data.train_dataloader())
    assert sum(int(batch["num_skipped"]) for batch in batches) == 1
    assert "001" in caplog.text
    assert "cannot read its image" in caplog.text
    captions = {caption for _, _, caption in pairs()}
    assert {text for batch in batches for text in batch["captions"]} == captions
    read = [name for batch in data.val_dataloader() for name in batch["names"] if name]
    assert len(read) == 24
    read = [name for batch in data.test_dataloader() for name in batch["names"] if name]
    assert len(read) == 23
    data = ready(make_data(tmp_path / "train.tar", on_error="raise"))
    with pytest.raises(ValueError, match="cannot read its image"):
        list(data.train_dataloader())
    assert data.val_dataloader() == []


def test_images_to_write_about_keep_their_order(tmp_path):
    folder = write_table(tmp_path / "table", count=12)
    # Longer than any caption of the model, which says nothing of the image.
    options = {"predict_source": str(folder), "long_captions": "refuse"}
    data = ready(make_data("nowhere", **options), "predict")
    names = [name for batch in data.predict_dataloader() for name in batch["names"]]
    assert names == [str(folder / f"{i:03d}.png") for i in range(12)]
    data = ready(make_data(folder), "predict")
    names = [name for batch in data.predict_dataloader() for name in batch["names"]]
    assert sorted(names) == [str(folder / f"{i:03d}.png") for i in (9, 11)]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    options = {"model_options": {"vocab_size": 100, "img_size": 16, "patch_size": 8}}
    with pytest.raises(ValueError, match="got vocab_size=100 and a tokenizer with 259 ids"):
        ready(make_data(write_table(tmp_path)), **options)


def test_options_are_those_of_pairs(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be 2 or more, got 1"):
        make_data(tmp_path, batch_size=1)
    with pytest.raises(ValueError, match="the test needs pairs, got source="):
        ready(make_data(tmp_path / "train.tar")).test_dataloader()
