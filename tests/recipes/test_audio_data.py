import pytest
import torch

from recipes.audio_data import AudioDataModule
from recipes.audio_samples import AudioAugmentationConfig
from recipes.audio_soundscapes import SoundscapeConfig
from tests.recipes.audio_runs import CLASSES, RATE, same_batches, tiny_model, write_tones


@pytest.fixture
def folder(tmp_path):
    return write_tones(tmp_path / "tones", per_class=10)


def made(source, stage="fit", **options):
    data = AudioDataModule(source=str(source), **{"batch_size": 4, **options})
    data.setup(stage, model=tiny_model())
    return data


def test_recordings_have_the_models_rate_and_are_changed_in_training_only(folder):
    data = made(folder)
    assert data.class_names == CLASSES
    assert sum(data.class_counts) == sum(
        len(batch["names"]) for batch in data.plain_train_dataloader(1)
    )
    batch = next(iter(data.val_dataloader()))
    assert 800 <= int(batch["lengths"].max()) <= 1200
    assert same_batches(batch, next(iter(data.val_dataloader())))
    plain = {
        name: wave
        for batch in data.plain_train_dataloader(1)
        for name, wave in zip(batch["names"], batch["waveform"], strict=True)
    }
    batch = next(iter(data.train_dataloader()))
    assert all(
        not torch.equal(wave[:700], plain[name][:700])
        for name, wave in zip(batch["names"], batch["waveform"], strict=True)
    )
    same = made(folder, augmentation=None)
    batch = next(iter(same.train_dataloader()))
    assert torch.equal(batch["waveform"][0, :700], plain[batch["names"][0]][:700])
    shaped = made(folder, augmentation=AudioAugmentationConfig(shift=1.0), seed=3)
    assert int(next(iter(shaped.train_dataloader()))["lengths"].max()) > 1500


def test_longest_in_training_and_without(folder):
    data = made(folder, max_seconds=0.1, augmentation=None)
    assert next(iter(data.train_dataloader()))["waveform"].shape == (4, 400)
    assert next(iter(data.val_dataloader()))["waveform"].shape[1] == 400
    data = made(folder, max_seconds=0.1, eval_seconds=0.15, augmentation=None, eval_batch_size=2)
    assert next(iter(data.train_dataloader()))["waveform"].shape == (4, 400)
    assert next(iter(data.test_dataloader()))["waveform"].shape == (2, 600)


def test_soundscapes_of_each_split(folder):
    config = SoundscapeConfig(seconds=0.5, num_train=12, num_val=3, num_test=5)
    data = made(folder, soundscapes=config)
    assert len(data.train_dataloader()) == 3
    batch = next(iter(data.train_dataloader()))
    assert batch["waveform"].shape == (4, RATE // 2)
    assert all(events.shape[1] == 3 for events in batch["events"])
    assert sum(len(batch["names"]) for batch in data.val_dataloader()) == 3
    assert sum(len(batch["names"]) for batch in data.test_dataloader()) == 5
    # Its own sounds only.
    sounds = data._samples("val", is_training=False)
    assert len(sounds._clips) == len(data._recordings["val"]) < len(data._recordings["train"])


def test_soundscapes_need_classes(tmp_path):
    (tmp_path / "t.csv").write_text("path,transcript\na.wav,hello\n")
    with pytest.raises(ValueError, match=r"of recordings with a class, got .*t.csv"):
        made(tmp_path / "t.csv", soundscapes=SoundscapeConfig(), val_fraction=0, test_fraction=0)


def test_a_task_gets_what_it_learns_from(folder, tmp_path):
    """Else a tagger would train on nothing, with a loss of 0."""
    data = AudioDataModule(source=str(folder), soundscapes=SoundscapeConfig())
    data.setup("fit", model=tiny_model())
    data.require("events")
    with pytest.raises(ValueError, match=r"needs the label of every recording, got events of"):
        data.require("label")
    plain = AudioDataModule(source=str(folder))
    plain.setup("fit", model=tiny_model())
    plain.require("label")
    with pytest.raises(ValueError, match=r"the events of every recording, got label of .*\.wav"):
        plain.require("events")


def test_transcripts_reach_the_batch(folder, tmp_path):
    path = next((folder / "low").iterdir())
    lines = ["path,transcript", *[f"{path},word {i}" for i in range(3)]]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = made(tmp_path / "t.csv", val_fraction=0.0, test_fraction=0.0, batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["transcripts"]) == ["word 0", "word 1", "word 2"]
    assert data.class_names is None
    assert data.val_dataloader() == []


def test_prediction_reads_a_folder_in_its_order(folder):
    data = made("nowhere", "predict", predict_source=str(folder / "low"))
    names = [name for batch in data.predict_dataloader() for name in batch["names"]]
    assert names == sorted(str(path) for path in (folder / "low").iterdir())
    data = made(folder, "predict")
    assert len(data.predict_dataloader()) == len(data.test_dataloader())


def test_no_test_says_so(folder):
    data = made(folder, test_fraction=0.0)
    assert not data.has_test
    with pytest.raises(ValueError, match=r"without those of a split 'test' and test_fraction=0.0"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "got 0.5 and 0.5"),
        ({"max_seconds": 0.0}, "max_seconds must be positive, got 0.0"),
        ({"eval_seconds": -1.0}, "eval_seconds must be positive, got -1.0"),
        ({"eval_seconds": 1.0, "soundscapes": SoundscapeConfig()}, "got eval_seconds=1.0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"on_error": "stop"}, "got 'stop'"),
        ({"source": "a.tar", "val_source": "b"}, "all sources must be shards, got a.tar, b"),
        ({"source": "a.tar", "soundscapes": SoundscapeConfig()}, r"of files, got source='a.tar'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AudioDataModule(**options)
