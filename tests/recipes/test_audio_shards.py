import io
import json
import logging

import numpy as np
import pytest
import soundfile
import torch

from recipes.audio_data import AudioDataModule
from recipes.audio_samples import AudioAugmentationConfig
from recipes.audio_shards import ShardDecoder, shard_filler
from recipes.classification_metrics import UNLABELLED
from recipes.shard_sources import ShardConfig, is_tar
from recipes.shard_writer import ShardWriter
from recipes.shards import ShardLoader
from tests.recipes.audio_runs import CLASSES, PITCHES, RATE, encoded, tiny_model, tone

QUIET = AudioAugmentationConfig(gain_db=0.0, speed=0.0, noise_db=None)


def write_shard(folder, number, samples):
    with ShardWriter(folder, prefix=f"s{number}") as writer:
        for key, parts in samples.items():
            writer.write(key, parts)


def write_tone_shards(folder, *, shards=2, per_class=3):
    for number in range(shards):
        samples = {
            f"{number}{name}{i}": {
                "flac": encoded(tone(pitch, 0.3, seed=i)),
                "cls": str(CLASSES.index(name)).encode(),
            }
            for name, pitch in PITCHES.items()
            for i in range(per_class)
        }
        write_shard(folder, number, samples)
    return f"{folder}/s{{0..{shards - 1}}}-000000.tar"


def decoder(**options):
    defaults = {
        "class_names": CLASSES,
        "sample_rate": RATE,
        "max_seconds": None,
        "augmentation": None,
        "is_training": False,
    }
    return ShardDecoder(**(defaults | options))


class Parts(dict):
    def first(self, *names):
        found = [self[name] for name in names if name in self]
        if not found:
            raise ValueError(f"it has no {names}")
        return found[0]


def parts(wave=None, **known):
    wave = tone(300.0, 1.0) if wave is None else wave
    return Parts({"__key__": "in/a", "flac": encoded(wave), **known})


def test_class_by_number_or_name(tmp_path):
    for cls, number in ((b"2", 2), (b"low\n", 1)):
        sample = decoder()(parts(cls=cls))
        assert (sample["label"], sample["name"]) == (number, "a")
        assert sample["waveform"].shape == (RATE,)
    assert decoder()(parts(json=b'{"label": "high"}'))["label"] == 0
    assert decoder()(parts(json=b'{"label": 1}'))["label"] == 1


def test_events_and_transcripts():
    rows = [{"tag": "low", "start": 0.25, "end": 0.5}]
    sample = decoder()(parts(json=json.dumps({"events": rows}).encode()))
    assert sample["events"].tolist() == [[0.25, 0.5, 1.0]]
    sample = decoder(class_names=())(parts(txt="grüß dich".encode()))
    assert sample["transcript"] == "grüß dich"


def test_rate_and_channels_are_the_models():
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone(300.0, 1.0, rate=8000)] * 2, axis=1), 8000, format="WAV")
    sample = decoder()(Parts({"__key__": "a", "wav": file.getvalue(), "cls": b"0"}))
    assert sample["waveform"].shape == (RATE,)


def test_window_is_the_front_or_in_training_drawn():
    wave = tone(300.0, 1.0)
    whole = decoder()(parts(wave, cls=b"0"))["waveform"]
    front = decoder(max_seconds=0.25)(parts(wave, cls=b"0"))["waveform"]
    assert torch.equal(front, whole[:1000])
    train = decoder(max_seconds=0.25, is_training=True, augmentation=QUIET)
    rows = json.dumps({"events": [{"tag": "low", "start": 0.0, "end": 1.0}]}).encode()
    starts = set()
    for seed in range(4):
        np.random.seed(seed)
        sample = train(parts(wave, json=rows))
        starts.add(int((whole == sample["waveform"][0]).nonzero()[0]))
        assert sample["events"].tolist() == [[0.0, 0.25, 1.0]]
    assert len(starts) == 4
    louder = decoder(is_training=True, augmentation=AudioAugmentationConfig(noise_db=-10.0))
    assert not torch.equal(louder(parts(wave, cls=b"0"))["waveform"][:900], whole[:900])


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"cls": b"3"}, "there are 3 classes, got the class 3"),
        ({"cls": b"cow"}, "the classes are high, low, middle, got cow"),
        ({"cls": b"\xff"}, "can't decode"),
        ({"json": b"{"}, "its json is none"),
        ({"json": b"{}"}, "it has no label, no transcript and no events"),
        ({"json": b'{"events": [{"tag": "low"}]}'}, "events need tag, start and end"),
        ({"txt": b"hi", "long": b""}, "may have 0.5 seconds, got 1.0"),
        ({"json": b"7"}, "its json must be an object, got 7"),
        ({"json": b"[" * 100_000}, "its json is none: maximum recursion depth"),
        ({"json": b'{"label": "low", "transcript": 5}'}, "its transcript must be text, got 5"),
        (
            {"json": b'{"events": [{"tag": "low", "start": NaN, "end": 1}]}'},
            "its start before its end, got nan and 1.0 for 'low'",
        ),
        (
            {"json": b'{"events": [{"tag": "low", "start": 0.4, "end": 0.1}]}'},
            "its start before its end, got 0.4 and 0.1 for 'low'",
        ),
        ({}, "it has no"),
    ],
)
def test_wrong_samples_are_refused(known, message):
    with pytest.raises(ValueError, match=message):
        decoder(max_seconds=0.5)(parts(**known))


@pytest.mark.parametrize(("needs", "known"), [("events", {"cls": b"1"}), ("label", {"txt": b"hi"})])
def test_samples_without_what_a_task_needs_are_refused(needs, known):
    decoder()(parts(**known))
    with pytest.raises(ValueError, match=f"it has no {needs}"):
        decoder(needs=needs)(parts(**known))


def test_tasks_with_classes_need_their_names(tmp_path):
    urls = write_tone_shards(tmp_path)
    data = AudioDataModule(source=urls, val_source=urls)
    data.setup("fit", model=tiny_model())
    data.train_dataloader()
    data.require("label")
    with pytest.raises(ValueError, match=r"need the names of their classes, got class_names=None"):
        data.train_dataloader()


def test_data_module_trains_and_evaluates_from_shards(tmp_path):
    urls = write_tone_shards(tmp_path)
    data = AudioDataModule(
        source=urls,
        val_source=urls,
        class_names=list(CLASSES),
        batch_size=4,
        shards=ShardConfig(batches_per_epoch=5, shuffle=4),
    )
    data.setup("fit", model=tiny_model())
    assert data.class_names == CLASSES
    loader = data.train_dataloader()
    assert isinstance(loader, ShardLoader)
    batches = list(loader)
    assert len(batches) == 5
    assert batches[0]["waveform"].shape[0] == 4
    held_out = list(data.val_dataloader())
    labels = torch.cat([batch["labels"] for batch in held_out])
    assert sorted(labels[labels != UNLABELLED].tolist()) == sorted([0, 1, 2] * 6)
    assert not data.has_test
    limited = list(data.plain_train_dataloader(3))
    assert sum(len(batch["names"]) for batch in limited) == 3
    with pytest.raises(ValueError, match="nobody knows how many training recordings of a class"):
        _ = data.class_counts


def test_damaged_and_missing_shards_are_skipped_by_name_and_counted(tmp_path, caplog):
    urls = write_tone_shards(tmp_path)
    bad = {"x": {"flac": encoded(tone(300.0, 0.3))[:90], "cls": b"0"}}
    write_shard(tmp_path, 2, bad)
    cut = tmp_path / "s1-000000.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    options = {"batch_size": 2, "class_names": list(CLASSES), "val_source": None}
    names = [str(tmp_path / f"s{i}-000000.tar") for i in range(3)]
    source = f"{tmp_path}/s{{0..2}}-000000.tar"
    data = AudioDataModule(
        source=source,
        shards=ShardConfig(batches_per_epoch=9, shuffle=0),
        **options,
    )
    data.setup("fit", model=tiny_model())
    with caplog.at_level(logging.WARNING):
        batches = list(data.train_dataloader())
    assert sum(int(batch["num_skipped"]) for batch in batches) >= 2
    assert all((batch["labels"] != UNLABELLED).all() for batch in batches)
    assert names[1] in caplog.text
    assert names[2] in caplog.text
    assert urls

    data = AudioDataModule(source=names[2], on_error="raise", **{**options, "batch_size": 1})
    data.setup("fit", model=tiny_model())
    with pytest.raises(ValueError, match=r"s2-000000.tar"):
        next(iter(data.train_dataloader()))


def test_filler_counts_for_nothing():
    filler = shard_filler()
    assert (filler["label"], filler["name"], filler["events"]) == (UNLABELLED, "", None)


def test_shards_are_known_by_their_name():
    assert all(map(is_tar, ("a-{000..009}.tar", "b.tar.gz", "c.tgz")))
    assert not any(map(is_tar, ("samples", "tar", "a.csv")))
