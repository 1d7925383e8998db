import io
import json
import tarfile
from itertools import islice

import pytest
import torch

from recipes.image_text_data import ImageTextDataModule
from recipes.image_text_shards import (
    PairDecoder,
)
from recipes.image_text_sources import TableColumns
from recipes.shard_files import Sample
from recipes.shard_hub import HubSource
from recipes.shard_sources import HeldOutShardConfig, is_sharded, open_shards
from tests.recipes.image_text_runs import COLOURS, encoder, picture, tiny_model

NUMBER = 12


def png(colour, number):
    content = io.BytesIO()
    picture(colour, number).save(content, "png")
    return content.getvalue()


def write_shard(path, numbers, **changes):
    """Writes pictures with captions; `changes` are the parts of the sample of a number."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            colour = list(COLOURS)[number % 3]
            parts = {"png": png(colour, number), "txt": f"{colour} {number}".encode()}
            for extension, content in changes.get(f"n{number}", parts).items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    write_shard(tmp_path / "a.tar", range(6))
    write_shard(tmp_path / "b.tar", range(6, NUMBER))
    write_shard(tmp_path / "val.tar", range(100, 105))
    return tmp_path


def data_module(folder, *, source="{a,b}.tar", **options):
    defaults = {
        "batch_size": 3,
        "val_fraction": 0.0,
        "shards": HeldOutShardConfig(batches_per_epoch=4, shuffle=0),
    }
    data = ImageTextDataModule(source=f"{folder}/{source}", **(defaults | options))
    data.setup("fit", model=tiny_model())
    return data


def decoder(**options):
    defaults = {"columns": TableColumns(), "max_pixels": 10**4, "is_training": False}
    return PairDecoder(**({"encoder": encoder(), **defaults} | options))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.tar", True), ("a.tar.gz", True), ("x.parquet", True), ("hub:x", True), ("x.csv", False)],
)
def test_shards_are_known_by_their_names(name, expected):
    assert is_sharded(name) == expected


def test_captions_come_from_text_or_json_or_a_column():
    for parts in (
        {"png": png("red", 0), "txt": b" a dot\n"},
        {"png": png("red", 0), "json": json.dumps({"caption": "a dot"}).encode()},
        {"image": png("red", 0), "caption": "a dot"},
    ):
        sample = decoder()(Sample(__key__="k", __url__="u", **parts))
        assert (sample["caption"], sample["name"]) == ("a dot", "k")
        assert sample["image"].shape == (3, 8, 8)
    columns = TableColumns(image="picture", caption="words")
    parts = {"picture": png("red", 0), "words": "a dot"}
    assert decoder(columns=columns)(Sample(__key__="k", **parts))["caption"] == "a dot"


IMAGE = {"png": png("red", 0)}
DAMAGED = {
    "no image": ({"txt": b"a"}, "it has no 'jpg or jpeg or png or webp or image', only txt"),
    "no caption": (IMAGE, "it has no 'txt or json or caption', only png"),
    "empty caption": ({**IMAGE, "txt": b" \n"}, "its caption is empty"),
    "no text": ({**IMAGE, "txt": b"\xff\xfe"}, "codec can't decode"),
    "json without it": ({**IMAGE, "json": b'{"a": 1}'}, "it needs text under 'caption', got"),
    "path for image": ({"image": "a.png", "caption": "a"}, "needs the bytes .* got 'a.png'"),
    "deep json": ({**IMAGE, "json": b"[" * 100_000}, "its json is none: maximum recursion"),
    "no json": ({**IMAGE, "json": b"{"}, "Expecting property name"),
    "truncated image": ({"png": png("red", 0)[:300], "txt": b"a"}, "cannot read its image"),
    "large image": ({**IMAGE, "txt": b"a"}, "max_pixels=99 pixels, got 16 x 16 = 256 in its image"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_sample_is_refused_by_what_is_wrong(kind):
    parts, message = DAMAGED[kind]
    read = decoder(max_pixels=99 if kind == "large image" else 10**4)
    with pytest.raises((ValueError, OSError), match=message):
        read(Sample(__key__="k", __url__="u", **parts))


def test_training_batches_resume_and_are_counted(folder):
    data = data_module(folder)
    whole = list(islice(data.train_dataloader(), 4))
    assert sorted(name for batch in whole for name in batch["names"]) == [
        f"{number:04d}" for number in range(NUMBER)
    ]
    loader = data.train_dataloader()
    list(islice(loader, 2))
    resumed = data_module(folder).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    for a, b in zip(whole[2:], resumed, strict=False):
        assert a["captions"] == b["captions"]
        assert torch.equal(a["images"], b["images"])


def test_damage_in_a_shard_is_skipped_by_name_or_stops(folder, caplog):
    bad = {"png": png("red", 0)[:200], "txt": b"red"}
    write_shard(folder / "b.tar", range(6, NUMBER), n8=bad)
    (folder / "a.tar").unlink()
    batches = list(data_module(folder).train_dataloader())
    assert sum(int(batch["num_skipped"]) for batch in batches) >= 3
    assert "a.tar" in caplog.text
    assert "b.tar, sample 0008: cannot read its image" in caplog.text
    assert "0008" not in [name for batch in batches for name in batch["names"]]
    with pytest.raises(ValueError, match=r"(a|b)\.tar"):
        list(data_module(folder, on_error="raise").train_dataloader())


def test_held_out_shards_are_read_once(folder):
    config = HeldOutShardConfig(
        val=f"{folder}/val.tar", test=f"{folder}/val.tar", max_eval_samples=4
    )
    data = data_module(folder, shards=config, eval_batch_size=2)
    assert data.has_test
    names = [name for batch in data.val_dataloader() for name in batch["names"]]
    assert names == ["0100", "0101", "0102", "0103"]
    training = data.eval_loader("train", limit=5, is_shared=False)
    assert sum(len(batch["names"]) for batch in training) == 5
    none = data_module(folder)
    assert none.val_dataloader() == []
    assert not none.has_test


def test_parquet_files_are_streamed_as_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": png("green", n), "path": None} for n in range(4)],
        "caption": [f"green {n}" for n in range(4)],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(str(tmp_path / "pairs.parquet"))
    module = data_module(tmp_path, source="pairs.parquet", batch_size=4)
    (batch,) = islice(module.train_dataloader(), 1)
    assert sorted(batch["captions"]) == [f"green {n}" for n in range(4)]
    assert batch["images"].shape == (4, 3, 16, 16)


def test_hub_names_may_say_the_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        HubSource, "__init__", lambda self, path, **options: asked.append((path, options))
    )
    open_shards("hub:someone/pairs")
    open_shards("hub:someone/pairs:validation")
    assert asked == [
        ("someone/pairs", {"split": "train"}),
        ("someone/pairs", {"split": "validation"}),
    ]
    assert open_shards("x/{0..3}.tar") == "x/{0..3}.tar"
