import logging

import numpy as np
import pytest
import soundfile
import torch

from recipes.audio_files import Recording
from recipes.audio_loader import audio_source
from recipes.audio_samples import AudioAugmentationConfig, Recordings
from recipes.audio_soundscapes import SoundscapeConfig, Soundscapes
from recipes.sample_loader import TrainLoader
from tests.recipes.audio_runs import CLASSES, RATE, tone, write_damaged, write_tones

LOUD = {"gain_db": 0.0, "noise_db": -80.0}


@pytest.fixture
def clips(tmp_path):
    folder = write_tones(tmp_path / "tones", per_class=2)
    found = [
        Recording(path=str(path), key=path.name, label=path.parent.name)
        for path in sorted(folder.rglob("*.wav"))
    ]
    return Recordings(recordings=found, class_names=CLASSES, sample_rate=RATE)


def made(clips, *, number=5, on_error="raise", **options):
    return Soundscapes(clips, config=SoundscapeConfig(**options), number=number, on_error=on_error)


def test_events_are_where_the_sounds_are(clips):
    sounds = made(clips, seconds=3.0, events_per_second=0.7, **LOUD)
    assert len(sounds) == 5
    for place in range(5):
        sample = sounds.read(place)
        assert sample.waveform.shape == (3 * RATE,)
        assert sample.name == f"soundscape {place}"
        is_event = torch.zeros(3 * RATE, dtype=torch.bool)
        for start, end, _ in sample.events.tolist():
            is_event[round(start * RATE) : round(end * RATE)] = True
        assert sample.waveform[is_event].abs().mean() > 0.2
        assert sample.waveform[~is_event].abs().max() < 0.02
    starts = sample.events[:, 0].tolist()
    assert starts == sorted(starts)


def test_events_have_the_class_of_their_sound(clips):
    for place in range(4):
        sample = made(clips, seconds=5.0, events_per_second=0.1, **LOUD).read(place)
        start, end, number = sample.events[0].tolist()
        part = sample.waveform[round(start * RATE) : round(end * RATE)]
        peak = float(torch.fft.rfft(part).abs().argmax()) * RATE / len(part)
        if len(sample.events) == 1:
            assert abs(peak - {"high": 1500, "low": 200, "middle": 600}[CLASSES[int(number)]]) < 10


def test_held_out_ones_are_always_the_same_and_training_ones_are_drawn(clips):
    sounds = made(clips, seconds=2.0)
    first = sounds.read(1)
    assert torch.equal(made(clips, seconds=2.0).read(1).waveform, first.waveform)
    assert not torch.equal(sounds.read(2).waveform, first.waveform)
    drawn = [sounds.read(1, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0].waveform, drawn[1].waveform)
    assert torch.equal(drawn[0].events, drawn[1].events)
    assert not torch.equal(drawn[0].waveform, drawn[2].waveform)


def test_number_and_loudness_of_sounds_are_as_asked(clips):
    sounds = made(clips, seconds=20.0, events_per_second=2.0, gain_db=30.0, noise_db=-60.0)
    numbers = [len(sounds.read(place).events) for place in range(5)]
    assert abs(np.mean(numbers) - 40) < 10
    # Never none.
    assert len(made(clips, seconds=1.0, events_per_second=1e-6).read(0).events) == 1
    quiet = made(clips, seconds=1.0, events_per_second=1e-6, gain_db=60.0, noise_db=-60.0)
    peaks = [float(quiet.read(place).waveform.abs().max()) for place in range(5)]
    assert 0.001 <= min(peaks) < 0.1
    noisy = made(clips, seconds=9.0, events_per_second=1e-6, gain_db=0.0, noise_db=-20.0)
    assert float(noisy.read(0).waveform.abs().median()) == pytest.approx(0.0675, rel=0.2)
    assert max(float(x.read(0).waveform.abs().max()) for x in (sounds, noisy)) <= 1.0


def test_sound_that_dies_away_ends_where_it_is_no_longer_heard(tmp_path):
    wave = tone(300.0, 2.0) * np.exp(-np.arange(8000) / RATE * 10).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    recordings = [Recording(path=str(tmp_path / "a.wav"), key="a", label="low")]
    clips = Recordings(recordings=recordings, class_names=("low",), sample_rate=RATE)
    ((start, end, _),) = made(clips, seconds=3.0, events_per_second=1e-6).read(0).events.tolist()
    # 40 dB are a factor of 100: ln(100) / 10 seconds.
    assert end - start == pytest.approx(0.46, abs=0.03)


def test_speed_of_training_sounds_is_changed(clips):
    config = AudioAugmentationConfig(speed=0.5, gain_db=0.0, noise_db=None)
    clips = Recordings(
        recordings=clips.recordings[:1],
        class_names=CLASSES,
        sample_rate=RATE,
        augmentation=config,
    )
    sounds = made(clips, seconds=1.0, events_per_second=1e-6)
    length = lambda sample: float(sample.events[0, 1] - sample.events[0, 0])  # noqa: E731
    drawn = [length(sounds.read(0, np.random.default_rng(seed))) for seed in range(6)]
    assert max(drawn) > 1.2 * min(drawn)
    assert length(sounds.read(0)) == pytest.approx(0.2, abs=0.01)


def test_sound_longer_than_the_soundscape_is_cut(clips):
    sample = made(clips, seconds=0.1).read(0)
    assert sample.waveform.shape == (0.1 * RATE,)
    assert sample.events[:, 1].max() <= 0.1 + 1e-6


def test_damaged_sounds_are_replaced_counted_and_named_or_stop(clips, tmp_path, caplog):
    write_damaged(tmp_path)
    bad = [Recording(path=str(tmp_path / "text.wav"), key="t", label="low")]
    mixed = Recordings(recordings=[*clips.recordings, *bad], class_names=CLASSES, sample_rate=RATE)
    sounds = made(mixed, seconds=20.0, on_error="skip")
    with caplog.at_level(logging.WARNING):
        sample = sounds.read(0)
    assert sample.num_skipped >= 1
    assert f"skipped: '{tmp_path / 'text.wav'}' cannot be read" in caplog.text
    with pytest.raises(ValueError, match=r"text.wav' cannot be read as audio"):
        made(mixed, seconds=20.0).read(0)
    none = Recordings(recordings=bad, class_names=CLASSES, sample_rate=RATE)
    with pytest.raises(ValueError, match="none of the 1 training recordings can be read"):
        made(none, on_error="skip").read(0)
    # The reader of soundscapes adds nothing to what the reader of sounds says.
    data = TrainLoader(audio_source(made(mixed, seconds=20.0)), batch_size=2, on_error="raise")
    with pytest.raises(ValueError, match=r"without such recordings\.\)$"):
        next(iter(data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
        ({"events_per_second": -1.0}, "events_per_second must be positive, got -1.0"),
        ({"gain_db": -1.0}, "got gain_db=-1.0 and noise_db=-50.0"),
        ({"noise_db": 1.0}, "and noise_db=1.0"),
        ({"num_val": 0}, "num_val must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoundscapeConfig(**options)
