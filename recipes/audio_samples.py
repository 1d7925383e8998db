"""Reads recordings as samples for a model, changed at random in training."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longnet_zoo.models.audio_files import audio_info, read_audio

from .audio_files import Recording
from .classification_metrics import UNLABELLED

__all__ = [
    "AudioAugmentationConfig",
    "AudioSample",
    "Recordings",
    "augment",
    "change",
    "make_sample",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioAugmentationConfig:
    """How a training recording is changed.

    Attributes:
        gain_db: Greatest change of loudness, up or down, in decibels.
        speed: Greatest relative change of speed, and so of pitch; recordings with events or a
            transcript keep theirs.
        shift: Most seconds of silence before a recording that is shorter than the window.
        noise_db: Loudest white noise that is added, relative to the recording's loudest sample;
            the level is drawn from the 40 dB below it. None adds none.
    """

    gain_db: float = 6.0
    speed: float = 0.1
    shift: float = 0.0
    noise_db: float | None = -30.0

    def __post_init__(self) -> None:
        if self.gain_db < 0 or self.shift < 0:
            raise ValueError(
                f"gain_db and shift must be 0 or more, got gain_db={self.gain_db} and "
                f"shift={self.shift}."
            )
        if not 0 <= self.speed < 1:
            raise ValueError(f"speed must be in [0, 1), got {self.speed}.")
        if self.noise_db is not None and self.noise_db > 0:
            raise ValueError(f"noise_db must be 0 or less, got {self.noise_db}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioSample:
    """What a model is given of a recording.

    Attributes:
        waveform: (samples,) float32.
        name: Of the recording.
        label: Number of its class, `UNLABELLED` where it has none.
        events: Start and end in seconds and number of the class of each event, (k, 3); None where
            nobody says what is heard when.
        transcript: What is said; None where nobody says.
        num_skipped: Files that could not be read for it.
    """

    waveform: Tensor
    name: str
    label: int = UNLABELLED
    events: Tensor | None = None
    transcript: str | None = None
    num_skipped: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recordings:
    """Recordings as samples.

    Attributes:
        recordings: What and where they are.
        class_names: Names of the classes.
        sample_rate: Samples a second, to which all are brought.
        max_seconds: What is read of a longer one: a part at random in training, else its front;
            None reads all. A longer one with a transcript cannot be read.
        augmentation: How training samples are changed.
    """

    recordings: Sequence[Recording]
    class_names: tuple[str, ...]
    sample_rate: int
    max_seconds: float | None = None
    augmentation: AudioAugmentationConfig | None = None

    def __len__(self) -> int:
        return len(self.recordings)

    def name(self, place: int) -> str:
        """Returns the file's path, and the part of it if it is one."""
        recording = self.recordings[place]
        if not recording.start and recording.end is None:
            return recording.path
        end = "" if recording.end is None else f"{recording.end:g}"
        return f"{recording.path} [{recording.start:g}-{end} s]"

    def read(self, place: int, rng: np.random.Generator | None = None) -> AudioSample:
        """Reads a recording.

        Args:
            place: Which one.
            rng: What to draw from in training; None reads it as it is.

        Raises:
            OSError: It cannot be read or is damaged.
            ValueError: It has not the sound or text that is asked for.
        """
        recording = self.recordings[place]
        start, duration = self._window(recording, rng)
        waveform = read_audio(
            recording.path, sample_rate=self.sample_rate, start=start, duration=duration
        )
        sample = make_sample(
            waveform,
            dataclasses.replace(recording, path=self.name(place)),
            class_names=self.class_names,
            sample_rate=self.sample_rate,
            offset=start - recording.start,
        )
        if rng is None or self.augmentation is None:
            return sample
        room = math.inf if self.max_seconds is None else self.max_seconds * self.sample_rate
        return augment(
            sample, self.augmentation, rng, max_shift=room - len(waveform), rate=self.sample_rate
        )

    def _window(
        self, recording: Recording, rng: np.random.Generator | None
    ) -> tuple[float, float | None]:
        """Returns start and length in seconds of what is read, None for all that is there."""
        start, end = recording.start, recording.end
        if self.max_seconds is None or (recording.transcript is None and rng is None):
            lengths = [] if end is None else [end - start]
            lengths += [] if self.max_seconds is None else [self.max_seconds]
            return start, min(lengths, default=None)
        length = (audio_info(recording.path).seconds if end is None else end) - start
        spare = length - self.max_seconds
        if spare > 0 and recording.transcript is not None:
            raise ValueError(
                f"a recording with a transcript may have {self.max_seconds:g} seconds, got "
                f"{length:.1f} in {recording.path}. Raise data.max_seconds, or cut it with its "
                "transcript."
            )
        if spare <= 0:
            return start, None if end is None else length
        assert rng is not None
        return start + float(rng.uniform(0, spare)), self.max_seconds


def make_sample(
    waveform: Tensor,
    recording: Recording,
    *,
    class_names: tuple[str, ...],
    sample_rate: int,
    offset: float = 0.0,
) -> AudioSample:
    """Makes a sample of a waveform, (samples,), and what is known of it.

    Args:
        waveform: The sound.
        recording: What is known of it.
        class_names: Names of the classes.
        sample_rate: Samples a second.
        offset: Seconds of the recording before the waveform.

    Raises:
        ValueError: There is no text where there should be, or a class is unknown.
    """
    transcript, label = recording.transcript, recording.label
    if transcript is not None and not transcript.strip():
        raise ValueError(f"a transcript must not be empty, got {transcript!r} of {recording.path}.")
    unknown = sorted(set(recording.classes) - set(class_names))
    if unknown:
        raise ValueError(
            f"the classes are {', '.join(class_names)}, got {', '.join(unknown)} in "
            f"{recording.path}."
        )
    events = None
    if recording.events is not None:
        length = len(waveform) / sample_rate
        rows = [
            (
                max(0.0, event.start - offset),
                min(length, event.end - offset),
                class_names.index(event.tag),
            )
            for event in recording.events
            if event.end > offset and event.start < offset + length
        ]
        events = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)
    return AudioSample(
        waveform=waveform,
        name=recording.path,
        label=UNLABELLED if label is None else class_names.index(label),
        events=events,
        transcript=transcript,
    )


def augment(
    sample: AudioSample,
    config: AudioAugmentationConfig,
    rng: np.random.Generator,
    *,
    max_shift: float,
    rate: int,
) -> AudioSample:
    """Changes a sample at random.

    Args:
        sample: The sample; with events or a transcript it keeps its time.
        config: How.
        rng: What to draw from.
        max_shift: Samples that it may become longer by, at most.
        rate: Samples a second.
    """
    keeps_time = sample.events is not None or sample.transcript is not None
    waveform = change(sample.waveform, config, rng, keeps_speed=keeps_time)
    if not keeps_time:
        room = len(sample.waveform) + max_shift
        most = int(max(0, min(config.shift * rate, room - len(waveform))))
        waveform = torch.nn.functional.pad(waveform, (int(rng.integers(0, most + 1)), 0))
        waveform = waveform[: int(min(room, len(waveform)))]
    return dataclasses.replace(sample, waveform=add_noise(waveform, config, rng))


def change(
    waveform: Tensor,
    config: AudioAugmentationConfig,
    rng: np.random.Generator,
    *,
    keeps_speed: bool = False,
) -> Tensor:
    """Changes loudness and speed of a waveform, (samples,), at random."""
    gain = 10 ** (float(rng.uniform(-config.gain_db, config.gain_db)) / 20)
    if config.speed and not keeps_speed:
        rate = math.exp(float(rng.uniform(-1, 1)) * math.log1p(config.speed))
        places = np.arange(0, len(waveform) - 1 + 1e-9, rate)
        samples = np.interp(places, np.arange(len(waveform)), waveform.numpy())
        waveform = torch.from_numpy(samples.astype(np.float32))
    return waveform * gain


def add_noise(
    waveform: Tensor, config: AudioAugmentationConfig, rng: np.random.Generator
) -> Tensor:
    """Adds white noise of a random level to a waveform, (samples,)."""
    if config.noise_db is None:
        return waveform
    level = 10 ** (float(rng.uniform(config.noise_db - 40, config.noise_db)) / 20)
    noise = torch.from_numpy(rng.standard_normal(len(waveform), dtype=np.float32))
    return waveform + level * waveform.abs().max() * noise
