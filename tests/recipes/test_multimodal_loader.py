"""Batches of scenes: composed ones, and those of shards in which modalities are missing."""

import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from longnet_zoo.models import (
    AudioModality,
    FeaturesModality,
    FramesModality,
    ImageModality,
    TextModality,
)
from recipes.classification_metrics import UNLABELLED
from recipes.multimodal_loader import EvalScenes, SceneCollator, TrainScenes, pixels
from recipes.multimodal_scenes import Scene
from recipes.multimodal_shards import SceneCollate, SceneDecoder, filler_scene
from recipes.shard_files import Sample
from recipes.shard_writer import ShardWriter
from recipes.shards import ShardEvalLoader, ShardLoader

RATE = 1000
MODALITIES = (
    FramesModality(name="video", img_size=8, patch_size=8, in_chans=1),
    AudioModality(name="sound", sample_rate=RATE, window_size=64, hop_size=20, num_mels=8),
    TextModality(name="question"),
)
COLLATE = SceneCollator(modalities=MODALITIES)
CLASSES = ("cat", "dog")


def scene(place=0, **options):
    defaults = {
        "frames": torch.full((2, 1, 8, 8), 255 - place, dtype=torch.uint8),
        "waveform": torch.full((50,), float(place)),
        "question": "what?",
        "label": 1,
        "name": f"s{place}",
        "seconds": 0.5,
    }
    return Scene(**{**defaults, **options})


class Numbered:
    """Scenes that say what they were drawn from."""

    def __len__(self):
        return 7

    def read(self, place, rng=None):
        drawn = 0.0 if rng is None else rng.uniform()
        return scene(place, waveform=torch.full((3,), drawn), num_skipped=int(place == 3))


def test_batch_says_what_is_there():
    batch = COLLATE(
        [
            scene(0),
            scene(1, waveform=None, num_skipped=2),
            scene(2, frames=None, question=None, waveform=torch.ones(30), label=UNLABELLED),
        ]
    )
    assert batch["present"] == {
        "video": [True, True, False],
        "sound": [True, False, True],
        "question": [True, True, False],
    }
    assert batch["inputs"]["video"].shape == (3, 2, 1, 8, 8)
    assert batch["inputs"]["video"][0].unique().tolist() == [1.0]
    torch.testing.assert_close(pixels(batch["inputs"]["video"][1]).mean(), torch.tensor(254.0))
    assert batch["times"]["video"][0].tolist() == [0.25, 0.75]
    assert set(batch["times"]) == {"video"}
    assert batch["inputs"]["question"][1].tolist() == list(b"what?")
    assert batch["padding_masks"]["sound"].sum(1).tolist() == [0, 49, 20]
    assert batch["labels"].tolist() == [1, 1, UNLABELLED]
    assert batch["num_skipped"] == 2
    assert batch["questions"] == ["what?", "what?", ""]
    # What nobody has is left out, and equal lengths need no mask.
    silent = COLLATE([scene(waveform=None), scene(waveform=None)])
    assert list(silent["inputs"]) == ["video", "question"]
    assert silent["padding_masks"] == {}
    two = SceneCollator(modalities=MODALITIES[::2])([scene(), scene()])
    assert list(two["inputs"]) == ["video", "question"]


@pytest.mark.parametrize(
    ("modality", "kinds"),
    [
        (FeaturesModality(name="tiles", input_dim=3), "text, features"),
        (ImageModality(name="photo"), "text, image"),
        (TextModality(name="caption"), "text, text"),
    ],
)
def test_models_of_other_modalities_are_refused(modality, kinds):
    with pytest.raises(ValueError, match=f"modalities of the kinds {kinds}"):
        SceneCollator(modalities=(MODALITIES[2], modality))


def test_training_scenes_depend_on_seed_epoch_and_place_alone():
    def heard(loader, number):
        batches = []
        while len(batches) < number:
            batches += list(loader)
        return [
            {
                name: float(row[0])
                for name, row in zip(b["names"], b["inputs"]["sound"], strict=True)
            }
            for b in batches[:number]
        ]

    options = {"batch_size": 3, "rank": 0, "world_size": 1, "repeat": 0}
    options |= {"num_workers": 0, "pin_memory": False}
    first = heard(TrainScenes(Numbered(), COLLATE, seed=1, **options), 4)
    assert first == heard(TrainScenes(Numbered(), COLLATE, seed=1, **options), 4)
    assert len({value for batch in first for value in batch.values()}) == 12
    assert first != heard(TrainScenes(Numbered(), COLLATE, seed=2, **options), 4)
    loader = TrainScenes(Numbered(), COLLATE, seed=1, **options)
    next(iter(loader))
    resumed = TrainScenes(Numbered(), COLLATE, seed=1, **options)
    resumed.load_state_dict(loader.state_dict())
    assert heard(resumed, 3) == first[1:]


def test_evaluation_shows_every_scene_once_on_all_ranks():
    options = {"batch_size": 3, "num_workers": 0, "pin_memory": False, "world_size": 2}
    shown = [list(EvalScenes(Numbered(), COLLATE, rank=rank, **options)) for rank in range(2)]
    names = [name for batches in shown for batch in batches for name in batch["names"]]
    labels = [label for batches in shown for batch in batches for label in batch["labels"].tolist()]
    assert sorted(filter(None, names)) == [f"s{i}" for i in range(7)]
    assert [label for name, label in zip(names, labels, strict=True) if not name] == [UNLABELLED]
    assert sum(int(b["num_skipped"]) for batches in shown for b in batches) == 1


def png(width=24, height=12):
    image = np.zeros((height, width), dtype=np.uint8)
    image[:, height:] = 200
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="png")
    return content.getvalue()


def flac(samples=500):
    content = io.BytesIO()
    tone = 0.5 * np.sin(np.arange(samples, dtype=np.float32) / 7)
    soundfile.write(content, tone, RATE, format="flac")
    return content.getvalue()


SAMPLES = {
    "whole": {"png": png(), "flac": flac(), "txt": b"cat or dog?", "cls": b"dog"},
    "silent": {"png": png(12), "txt": b"and now?", "cls": b"0"},
    "heard": {"flac": flac(300), "cls": b"cat"},
    "broken": {"flac": b"fLaC but no more", "cls": b"cat"},
    "narrow": {"png": png(17), "cls": b"cat"},
    "stranger": {"txt": b"what?", "cls": b"cow"},
    "nothing": {"cls": b"cat"},
}
DECODE = SceneDecoder(class_names=CLASSES, size=8, in_chans=1, sample_rate=RATE, seconds=1.0)


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for key, parts in SAMPLES.items():
            writer.write(key, parts)
    return str(next(tmp_path.glob("*.tar")))


def test_shards_give_what_each_sample_has(shards, caplog):
    options = {"collate": SceneCollate(collate=COLLATE), "batch_size": 7, "on_error": "skip"}
    (batch,) = ShardEvalLoader(shards, DECODE, filler=filler_scene(DECODE), **options)
    assert batch["labels"].tolist() == [1, 0, 0, *[UNLABELLED] * 4]
    assert batch["names"][:3] == ["whole", "silent", "heard"]
    assert {name: flags[:3] for name, flags in batch["present"].items()} == {
        "video": [True, True, False],
        "sound": [True, False, True],
        "question": [True, True, False],
    }
    frames = pixels(batch["inputs"]["video"][0])
    assert frames.shape == (2, 1, 8, 8)
    assert frames[0].max() < 60
    assert frames[1].min() > 140
    assert int(batch["num_skipped"]) == 4
    for reason in ("broken", "12 pixels", "one of cat, dog or a number below 2, got 'cow'"):
        assert reason in caplog.text
    assert "it needs one of png, jpg" in caplog.text


def test_damaged_samples_are_raised_if_asked(shards):
    options = {"batch_size": 7, "batches_per_epoch": 1, "shuffle": 0}
    loader = ShardLoader(shards, DECODE, collate=SceneCollate(collate=COLLATE), **options)
    with pytest.raises(ValueError, match="broken"):
        list(loader)


def test_a_model_without_eyes_or_ears_reads_none():
    blind = SceneDecoder(class_names=CLASSES, size=None, in_chans=1, sample_rate=None, seconds=1.0)
    sample = {**SAMPLES["whole"], "__key__": "whole"}
    found = blind(sample)["scene"]
    assert found.frames is None
    assert found.waveform is None
    assert found.question == "cat or dog?"
    assert filler_scene(blind)["scene"].label == UNLABELLED
    with pytest.raises(ValueError, match="it needs one of"):
        blind({**SAMPLES["heard"], "__key__": "heard"})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"png": "a.png"}, "needs the bytes of a file under 'png or .*', got 'a.png'"),
        ({"wav": [0.1, 0.2]}, r"needs the bytes of a file under '.*wav.*', got \[0.1, 0.2\]"),
        ({"txt": 5}, "its question must be text, got 5"),
    ],
)
def test_columns_of_other_kinds_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        DECODE(Sample(__key__="a", __url__="u", cls="cat", **parts))
