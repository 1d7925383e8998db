import logging
from itertools import islice

import numpy as np
import pytest
import torch

from recipes.audio_files import Recording
from recipes.audio_loader import audio_source, collate
from recipes.audio_samples import AudioAugmentationConfig, AudioSample, Recordings
from recipes.audio_soundscapes import SoundscapeConfig, Soundscapes
from recipes.classification_metrics import UNLABELLED
from recipes.sample_loader import EvalLoader, TrainLoader
from tests.recipes.audio_runs import CLASSES, RATE, same_batches, write_damaged, write_tones


@pytest.fixture
def recordings(tmp_path):
    folder = write_tones(tmp_path / "tones", per_class=3)
    found = [
        Recording(path=str(path), key=path.name, label=path.parent.name)
        for path in sorted(folder.rglob("*.wav"))
    ]
    return Recordings(
        recordings=found,
        class_names=CLASSES,
        sample_rate=RATE,
        augmentation=AudioAugmentationConfig(),
    )


def with_damaged(recordings, folder):
    reasons = write_damaged(folder)
    bad = [Recording(path=str(folder / name), key=name, label="low") for name in reasons]
    bad.append(Recording(path=str(folder / "missing.wav"), key="m", label="low"))
    whole = Recordings(
        recordings=[*recordings.recordings, *bad], class_names=CLASSES, sample_rate=RATE
    )
    return whole, {**reasons, "missing.wav": "No such file"}


def first(loader, number):
    """Returns batches across epochs."""
    found = []
    while len(found) < number:
        found += islice(iter(loader), number - len(found))
    return found


def train(recordings, **options):
    return TrainLoader(audio_source(recordings), **options)


def evaluate(recordings, **options):
    return EvalLoader(audio_source(recordings), **options)


def test_batches_are_padded_and_say_how_long_they_are(recordings):
    batch = next(iter(evaluate(recordings, batch_size=4, places=range(len(recordings)))))
    assert batch["lengths"].tolist() == [800, 840, 880, 800]
    assert batch["waveform"].shape == (4, 880)
    assert batch["labels"].tolist() == [0, 0, 0, 1]
    assert batch["names"] == [r.path for r in recordings.recordings[:4]]
    assert batch["events"] == batch["transcripts"] == [None] * 4
    for i, length in enumerate(batch["lengths"].tolist()):
        assert torch.equal(batch["waveform"][i, :length], recordings.read(i).waveform)
        assert not batch["waveform"][i, length:].any()


def test_batch_keeps_events_and_transcripts():
    samples = [
        AudioSample(waveform=torch.ones(3), name="a", events=torch.zeros(2, 3), num_skipped=2),
        AudioSample(waveform=torch.ones(5), name="b", transcript="hello"),
    ]
    batch = collate(samples, num_skipped=1)
    assert batch["events"][0].shape == (2, 3)
    assert batch["transcripts"] == [None, "hello"]
    assert batch["labels"].tolist() == [UNLABELLED] * 2
    assert int(batch["num_skipped"]) == 3


def test_an_epoch_has_each_recording_once_changed_in_another_way(recordings):
    loader = train(recordings, batch_size=3, seed=1)
    epochs = [first(loader, 3) for _ in range(2)]
    names = [[name for batch in epoch for name in batch["names"]] for epoch in epochs]
    assert sorted(names[0]) == sorted(names[1]) == sorted(r.path for r in recordings.recordings)
    assert names[0] != names[1]
    by_name = [
        dict(zip(own, torch.cat([b["waveform"][:, :700] for b in epoch]), strict=True))
        for own, epoch in zip(names, epochs, strict=True)
    ]
    assert not any(torch.equal(by_name[0][name], by_name[1][name]) for name in by_name[0])
    other = first(train(recordings, batch_size=3, seed=2), 1)[0]
    assert not same_batches(other, epochs[0][0])


@pytest.mark.parametrize("is_mixed", [False, True])
def test_workers_and_resumption_change_nothing(recordings, is_mixed):
    def made(**options):
        source = recordings
        if is_mixed:
            config = SoundscapeConfig(seconds=0.5, events_per_second=4.0)
            source = Soundscapes(recordings, config=config, number=7, on_error="raise")
        return train(source, batch_size=2, seed=5, **options)

    expected = first(made(), 7)
    found = first(made(num_workers=2), 7)
    assert all(same_batches(a, b) for a, b in zip(expected, found, strict=True))
    loader = made()
    first(loader, 4)
    resumed = made()
    resumed.load_state_dict(loader.state_dict())
    rest = first(resumed, 3)
    assert all(same_batches(a, b) for a, b in zip(expected[4:], rest, strict=True))


def test_ranks_share_an_epoch(recordings):
    loaders = [train(recordings, batch_size=2, rank=i, world_size=2) for i in range(2)]
    names = [name for x in loaders for batch in first(x, 2) for name in batch["names"]]
    assert len(set(names)) == 8
    loaders = [evaluate(recordings, batch_size=3, rank=i, world_size=2) for i in range(2)]
    batches = [batch for x in loaders for batch in x]
    assert [len(x) for x in loaders] == [2, 2]
    assert sorted(name for batch in batches for name in batch["names"])[0] == ""
    labels = torch.cat([batch["labels"] for batch in batches])
    assert int((labels != UNLABELLED).sum()) == 9


def test_damaged_files_are_skipped_by_name_and_counted(recordings, tmp_path, caplog):
    whole, reasons = with_damaged(recordings, tmp_path / "bad")
    with caplog.at_level(logging.WARNING):
        batches = list(evaluate(whole, batch_size=4, on_error="skip"))
    assert sum(int(batch["num_skipped"]) for batch in batches) == len(reasons) == 6
    assert sum(int((batch["labels"] != UNLABELLED).sum()) for batch in batches) == 9
    lines = caplog.text.splitlines()
    for name, reason in reasons.items():
        assert any(name in line and reason in line for line in lines), name

    batches = first(train(whole, batch_size=5, on_error="skip"), 3)
    assert sum(int(batch["num_skipped"]) for batch in batches) >= 6
    assert all((batch["labels"] != UNLABELLED).all() for batch in batches)
    # Another recording took the place of each.
    assert sum(len(batch["names"]) for batch in batches) == 15


@pytest.mark.parametrize("name", ["truncated.flac", "empty.wav", "nan.wav", "missing.wav"])
def test_damaged_files_stop_the_run_if_asked(tmp_path, name):
    reason = write_damaged(tmp_path).get(name, "No such file")
    bad = Recording(path=str(tmp_path / name), key=name, label="low")
    whole = Recordings(recordings=[bad], class_names=CLASSES, sample_rate=RATE)
    for loader in (evaluate(whole, batch_size=1), train(whole, batch_size=1)):
        with pytest.raises(ValueError, match=f"{reason}|{name}.*{reason}") as error:
            next(iter(loader))
        assert name in str(error.value)
        assert "--data.on_error skip" in str(error.value)


def test_too_few_recordings_are_refused(recordings):
    with pytest.raises(ValueError, match="takes 10 recordings, got 9 for training"):
        train(recordings, batch_size=10)


def test_samples_may_be_repeated(recordings):
    loader = train(recordings, batch_size=3, repeat=1)
    a, b = first(loader, 2)
    assert same_batches(a, b)
    assert np.isfinite(a["waveform"].numpy()).all()
