import dataclasses

import numpy as np
import pytest
import soundfile
import torch

from longnet_zoo.models.audio_files import read_audio
from recipes.audio_files import Event, Recording
from recipes.audio_samples import AudioAugmentationConfig, Recordings
from recipes.classification_metrics import UNLABELLED
from tests.recipes.audio_runs import RATE, tone

QUIET = AudioAugmentationConfig(gain_db=0.0, speed=0.0, noise_db=None)


@pytest.fixture
def path(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(300.0, 2.0), RATE, subtype="FLOAT")
    return str(tmp_path / "a.wav")


def made(*recordings, **options):
    defaults = {"class_names": ("cat", "dog"), "sample_rate": RATE}
    return Recordings(recordings=recordings, **(defaults | options))


def recording(path, **options):
    return Recording(path=path, key="a", **options)


def draw(seed=0):
    return np.random.default_rng(seed)


def test_a_recording_is_read_as_it_is(path):
    samples = made(recording(path, label="dog"), recording(path))
    sample = samples.read(0)
    torch.testing.assert_close(sample.waveform, torch.from_numpy(tone(300.0, 2.0)))
    assert (sample.label, sample.name, sample.events) == (1, path, None)
    assert samples.read(1).label == UNLABELLED
    assert len(samples) == 2


def test_any_rate_and_stereo_become_the_models_rate_and_mono(tmp_path):
    wave = tone(300.0, 1.0, rate=11025)
    soundfile.write(tmp_path / "b.flac", np.stack([wave, 0 * wave], axis=1), 11025)
    waveform = made(recording(str(tmp_path / "b.flac"))).read(0).waveform
    assert abs(len(waveform) - RATE) <= 1
    expected = 0.5 * torch.from_numpy(tone(300.0, 1.0))
    assert (waveform[100:3900] - expected[100:3900]).abs().max() < 0.1


def test_part_of_a_recording_is_read_and_named(path):
    sample = made(recording(path, label="cat", start=0.5, end=0.75)).read(0)
    whole = read_audio(path, sample_rate=RATE)
    assert torch.equal(sample.waveform, whole[2000:3000])
    assert sample.name == f"{path} [0.5-0.75 s]"


def test_window_is_the_front_or_in_training_drawn(path):
    samples = made(recording(path, label="cat", start=0.5), max_seconds=0.5, augmentation=QUIET)
    whole = read_audio(path, sample_rate=RATE)
    assert torch.equal(samples.read(0).waveform, whole[2000:4000])
    drawn = [samples.read(0, draw(seed)).waveform for seed in range(9)]
    assert all(len(x) == 2000 for x in drawn)
    starts = {int((whole == x[0]).nonzero()[0]) for x in drawn}
    assert len(starts) > 5
    assert 2000 <= min(starts) < max(starts) <= 6000
    assert torch.equal(samples.read(0, draw(3)).waveform, drawn[3])
    # Nothing to draw.
    longer = dataclasses.replace(samples, max_seconds=2.0)
    assert torch.equal(longer.read(0, draw()).waveform, whole[2000:])


def test_events_keep_to_the_clock_of_the_window(path):
    events = (
        Event(tag="dog", start=0.1, end=0.2),
        Event(tag="cat", start=0.9, end=1.2),
        Event(tag="dog", start=1.9, end=2.5),
    )
    samples = made(recording(path, events=events), max_seconds=1.0, augmentation=QUIET)
    torch.testing.assert_close(
        samples.read(0).events, torch.tensor([[0.1, 0.2, 1.0], [0.9, 1.0, 0.0]])
    )
    whole = read_audio(path, sample_rate=RATE)
    sample = samples.read(0, draw(1))
    start = int((whole == sample.waveform[0]).nonzero()[0]) / RATE
    expected = [(0.9, 1.2, 0.0), (1.9, 2.5, 1.0), (0.1, 0.2, 1.0)]
    shifted = [(max(0.0, a - start), min(1.0, b - start), c) for a, b, c in expected]
    kept = sorted(row for row in shifted if row[1] > 0 and row[0] < 1.0)
    assert kept
    torch.testing.assert_close(sample.events, torch.tensor(kept), atol=1e-3, rtol=0.0)


def test_gain_speed_shift_and_noise(path):
    def read(**options):
        config = dataclasses.replace(QUIET, **options)
        samples = made(recording(path, label="dog"), augmentation=config)
        return [samples.read(0, draw(seed)).waveform for seed in range(8)]

    plain = torch.from_numpy(tone(300.0, 2.0))
    gains = torch.stack([x.norm() / plain.norm() for x in read(gain_db=6.0)])
    assert 0.5 <= gains.min() < 0.8 < 1.25 < gains.max() <= 2.0
    lengths = [len(x) / len(plain) for x in read(speed=0.5)]
    assert 1 / 1.51 < min(lengths) < 0.8 < 1.2 < max(lengths) < 1.51
    shifted = read(shift=0.5)
    silences = [len(x) - len(plain) for x in shifted]
    assert 0 <= min(silences) < max(silences) <= 2000
    assert all(torch.equal(x[n:], plain) for x, n in zip(shifted, silences, strict=True))
    noises = [(x - plain).std() / plain.abs().max() for x in read(noise_db=-20.0)]
    assert 10**-3 <= min(noises) < max(noises) <= 0.11


def test_faster_is_higher(path):
    samples = made(recording(path, label="dog"), augmentation=dataclasses.replace(QUIET, speed=0.5))
    wave = samples.read(0, draw(2)).waveform
    rate = 8000 / len(wave)
    peak = torch.fft.rfft(wave).abs().argmax() * RATE / len(wave)
    assert abs(rate - 1) > 0.1
    assert abs(float(peak) - 300.0 * rate) < 5


def test_a_changed_recording_is_no_longer_than_the_window(path):
    config = dataclasses.replace(QUIET, speed=0.5, shift=1.0)
    samples = made(recording(path, label="dog"), max_seconds=1.5, augmentation=config)
    assert max(len(samples.read(0, draw(seed)).waveform) for seed in range(8)) == 1.5 * RATE


def test_events_and_transcripts_keep_their_speed(path):
    config = dataclasses.replace(QUIET, speed=0.5, shift=1.0)
    for known in ({"events": ()}, {"transcript": "hello"}):
        samples = made(recording(path, **known), augmentation=config)
        assert {len(samples.read(0, draw(seed)).waveform) for seed in range(4)} == {8000}


def test_transcripts(path):
    samples = made(recording(path, transcript="hello there"), max_seconds=2.0)
    assert samples.read(0).transcript == "hello there"
    with pytest.raises(ValueError, match=r"may have 1.5 seconds, got 2.0 in .*a.wav"):
        dataclasses.replace(samples, max_seconds=1.5).read(0)
    with pytest.raises(ValueError, match=r"must not be empty, got ' ' of .*a.wav"):
        made(recording(path, transcript=" ")).read(0)


def test_unknown_classes_are_refused(path):
    with pytest.raises(ValueError, match=r"the classes are cat, dog, got cow in .*a.wav"):
        made(recording(path, label="cow")).read(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain_db": -1.0}, "got gain_db=-1.0 and shift=0.0"),
        ({"shift": -1.0}, "and shift=-1.0"),
        ({"speed": 1.0}, r"speed must be in \[0, 1\), got 1.0"),
        ({"noise_db": 3.0}, "noise_db must be 0 or less, got 3.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AudioAugmentationConfig(**options)
