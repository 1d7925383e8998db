"""Scenes: what is shown, heard and asked belong together, and are always the same."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from recipes.audio_files import Recording
from recipes.audio_samples import AudioAugmentationConfig, Recordings
from recipes.image_files import ImageFiles
from recipes.multimodal_scenes import SceneConfig, Scenes

RATE = 1000
# Each family is a tone of its own.
TONES = {"low": 50.0, "middle": 130.0, "high": 310.0}
CONFIG = SceneConfig(families=tuple(TONES), num_moments=2, noise_db=-60.0, silence=0.3, num_train=8)


@pytest.fixture
def sounds(tmp_path):
    recordings = []
    for family, tone in TONES.items():
        for number in range(2):
            path = tmp_path / f"{family}{number}.wav"
            wave = np.sin(2 * np.pi * tone * np.arange(600) / RATE).astype(np.float32)
            soundfile.write(path, 0.5 * wave, RATE)
            recordings.append(Recording(path=str(path), key=path.name, label=family))
    return Recordings(recordings=tuple(recordings), class_names=tuple(TONES), sample_rate=RATE)


@pytest.fixture
def images():
    """Of class k the pictures are of brightness 20 k."""
    labels = tuple(range(10))
    pixels = np.stack([np.full((8, 8), 20 * k, dtype=np.uint8) for k in labels])
    return ImageFiles(names=tuple(map(str, labels)), labels=labels, pixels=pixels, max_pixels=64)


def make(images, sounds, **options):
    defaults = {"config": CONFIG, "size": 8, "in_chans": 1, "number": 8, "on_error": "raise"}
    return Scenes(images, sounds, **{**defaults, **options})


def tone_of(waveform):
    spectrum = torch.fft.rfft(waveform).abs()
    return torch.argmax(spectrum).item() * RATE / len(waveform)


@pytest.mark.parametrize("is_training", [False, True])
def test_answer_is_what_is_shown_while_the_family_sounds(images, sounds, is_training):
    scenes = make(images, sounds)
    asked, silent = set(), 0
    for place in range(20):
        rng = np.random.default_rng((3, place)) if is_training else None
        scene = scenes.read(place, rng)
        assert scene.frames.shape == (2, 1, 8, 8)
        assert scene.waveform.shape == (2 * RATE,)
        assert len(set(scene.families)) == 2
        family = next(name for name in TONES if name in scene.question)
        moment = scene.families.index(family)
        assert scene.frames[moment].unique().tolist() == [20 * scene.label]
        for number, name in enumerate(scene.families):
            own = scene.waveform[number * RATE : (number + 1) * RATE]
            if not name:
                assert own.abs().max() < 0.01
                silent += 1
                continue
            assert tone_of(own) == pytest.approx(TONES[name], abs=3)
            # It begins within 0.15 s, and is over after 0.6 s more.
            assert own[150:600].abs().mean() > 0.1
            assert own[760:].abs().max() < 0.05
        asked.add((family, moment))
    assert len(asked) > 3
    assert 1 < silent < 12


def test_scenes_depend_on_what_is_drawn_from_alone(images, sounds):
    scenes, others = make(images, sounds), make(images, sounds)
    others.read(5)
    for rng in (lambda: None, lambda: np.random.default_rng(7)):
        one, other = scenes.read(2, rng()), others.read(2, rng())
        assert torch.equal(one.waveform, other.waveform)
        assert torch.equal(one.frames, other.frames)
        assert (one.question, one.label, one.name) == (other.question, other.label, other.name)
    assert not torch.equal(scenes.read(2).waveform, scenes.read(3).waveform)
    assert len({len(scenes.read(place).question) for place in range(9)}) == 1


def test_training_changes_sounds_and_evaluation_does_not(images, sounds):
    augmentation = AudioAugmentationConfig(speed=0.5, gain_db=0.0, noise_db=None)
    config = dataclasses.replace(CONFIG, silence=0.0)
    altered = dataclasses.replace(sounds, augmentation=augmentation)
    changed = make(images, altered, config=config)
    plain = make(images, sounds, config=config)
    assert torch.equal(changed.read(1).waveform, plain.read(1).waveform)
    tones = set()
    for seed in range(6):
        scene = changed.read(1, np.random.default_rng(seed))
        tones |= {round(tone_of(scene.waveform[:RATE]) / TONES[scene.families[0]], 1)}
    assert len(tones) > 2


def test_frames_take_the_size_and_channels_of_the_model(images, sounds):
    scene = make(images, sounds, size=12, in_chans=3).read(0)
    assert scene.frames.shape == (2, 3, 12, 12)
    assert scene.frames.dtype == torch.uint8


def test_damaged_files_are_skipped_and_counted_or_raised(images, sounds, tmp_path, caplog):
    (tmp_path / "low0.wav").write_bytes(b"RIFF but no more")
    names = []
    for number in range(2):
        path = tmp_path / f"{number}.png"
        Image.fromarray(images.pixels[number]).save(path)
        names.append(str(path))
    (tmp_path / "0.png").write_bytes(b"no picture")
    damaged = ImageFiles(names=tuple(names), labels=(0, 1), max_pixels=64)
    scenes = make(damaged, sounds, on_error="skip")
    skipped = sum(scenes.read(place).num_skipped for place in range(20))
    assert skipped > 4
    assert all(scenes.read(place).label == 1 for place in range(20))
    assert "0.png" in caplog.text
    assert "low0.wav" in caplog.text
    with pytest.raises(ValueError, match=r"0\.png.*on_error skip"):
        [make(damaged, sounds).read(i) for i in range(20)]
    with pytest.raises(ValueError, match=r"low0\.wav.*on_error skip"):
        [make(images, sounds).read(i) for i in range(20)]


def test_family_without_recordings_is_refused(images, sounds):
    config = dataclasses.replace(CONFIG, families=("low", "smell"))
    with pytest.raises(ValueError, match=r"got none of 'smell'. There are high, low, middle"):
        make(images, sounds, config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_moments": 0}, "num_moments must be 1 or more, got 0"),
        ({"num_moments": 5}, "num_moments=5 and families=tabla, ambi, drum, bass"),
        ({"silence": 1.5}, r"silence must be in \[0, 1\], got 1.5"),
        ({"moment_seconds": 0.1}, "moment_seconds must be above 0.15, got 0.1"),
        ({"gain_db": -1.0}, "got gain_db=-1.0"),
        ({"noise_db": 1.0}, "noise_db=1.0"),
        ({"question": "what?"}, r"question must have \{\} for the family, got 'what\?'"),
        ({"num_test": 0}, "num_test must be 1 or more, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SceneConfig(**options)
