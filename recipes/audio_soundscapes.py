"""Soundscapes: single sounds mixed at random moments into noise, with what is heard when.

As many of any length as one likes, from a few recordings, as in Salamon et al., "Scaper: a library
for soundscape synthesis and augmentation" (2017). Each split mixes its own recordings, so a model
is tested on sounds that it has never heard.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from .audio_samples import AudioSample, Recordings, change
from .loader import OnError, SkippingReader

__all__ = ["SoundscapeConfig", "Soundscapes"]

# Sounds that are kept in memory, since each is mixed many times.
_MAX_KEPT = 1024
# A sound is over when it stays below this part of its loudest sample: 40 dB.
_AUDIBLE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoundscapeConfig:
    """How soundscapes are mixed.

    Attributes:
        seconds: Length of each.
        events_per_second: Mean number of sounds that begin in a second.
        gain_db: The loudness of sounds is drawn from so many decibels below full scale.
        noise_db: Level of the white noise under them, relative to full scale.
        num_train: Soundscapes of an epoch; each epoch has new ones.
        num_val: Soundscapes to validate on, always the same.
        num_test: Soundscapes to test on, always the same.
    """

    seconds: float = 10.0
    events_per_second: float = 1.0
    gain_db: float = 18.0
    noise_db: float = -50.0
    num_train: int = 256
    num_val: int = 16
    num_test: int = 32

    def __post_init__(self) -> None:
        for name in ("seconds", "events_per_second"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.gain_db < 0 or self.noise_db > 0:
            raise ValueError(
                f"gain_db must be 0 or more and noise_db 0 or less, got gain_db={self.gain_db} and "
                f"noise_db={self.noise_db}."
            )
        for name in ("num_train", "num_val", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")


class Soundscapes:
    """Soundscapes of the recordings of a split, as samples with events.

    Args:
        clips: The recordings; with their `max_seconds` and, in training, their augmentation.
        config: How they are mixed.
        number: How many there are.
        on_error: "skip" takes another recording for one that cannot be read; "raise" stops at it.
    """

    def __init__(
        self, clips: Recordings, *, config: SoundscapeConfig, number: int, on_error: OnError
    ) -> None:
        self._clips, self._config, self._number = clips, config, number
        self._reader = SkippingReader(
            clips.read, num_samples=len(clips), unit="recordings", on_error=on_error
        )
        self._kept: dict[int, tuple[AudioSample, int]] = {}

    def __len__(self) -> int:
        return self._number

    def read(self, place: int, rng: np.random.Generator | None = None) -> AudioSample:
        """Mixes a soundscape.

        Args:
            place: Which one.
            rng: What to draw from in training; None mixes the same one every time.

        Raises:
            ValueError: A recording cannot be read, and `on_error` is "raise"; or none can.
        """
        is_training = rng is not None
        rng = np.random.default_rng(place) if rng is None else rng
        rate, config = self._clips.sample_rate, self._config
        length = round(config.seconds * rate)
        noise = rng.standard_normal(length, dtype=np.float32) * 10 ** (config.noise_db / 20)
        mixed = torch.from_numpy(noise.astype(np.float32))
        rows, num_skipped = [], 0
        for _ in range(max(1, int(rng.poisson(config.seconds * config.events_per_second)))):
            clip, skipped = self._clip(int(rng.integers(len(self._clips))))
            num_skipped += skipped
            sound = clip.waveform
            if is_training and self._clips.augmentation is not None:
                sound = change(sound, self._clips.augmentation, rng)
            sound = sound[:length]
            start = int(rng.integers(0, length - len(sound) + 1))
            gain = 10 ** (-float(rng.uniform(0, config.gain_db)) / 20)
            mixed[start : start + len(sound)] += gain * sound / sound.abs().max().clamp(min=1e-6)
            rows.append((start / rate, (start + _audible_samples(sound)) / rate, clip.label))
        rows.sort()
        return AudioSample(
            # No louder than what a file can hold.
            waveform=mixed / mixed.abs().max().clamp(min=1.0),
            name=f"soundscape {place}",
            events=torch.tensor(rows, dtype=torch.float32),
            num_skipped=num_skipped,
        )

    def _clip(self, place: int) -> tuple[AudioSample, int]:
        """Returns a recording, or the next that can be read, and how many could not."""
        if place not in self._kept:
            _, clip, skipped = self._reader.read_from(place)
            if len(self._kept) >= _MAX_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[place] = clip, skipped
        return self._kept[place]


def _audible_samples(waveform: Tensor) -> int:
    """Counts the samples up to the last one that can be heard."""
    loud = (waveform.abs() > _AUDIBLE * waveform.abs().max()).nonzero()
    return int(loud[-1]) + 1 if len(loud) else len(waveform)
