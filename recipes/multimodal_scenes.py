"""Scenes: a strip of pictures, a soundscape as long as it, and a question about both.

In every moment of a scene one picture is shown, and in most a sound is heard, each of another
family; the question names a family, and the answer is the class of what was shown while it sounded.
So every modality holds a part of the answer, and time is what joins them. Pictures and recordings
are real, and each split has its own; the composition is made, anew for every training sample.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from .audio_samples import AudioAugmentationConfig, Recordings, change
from .image_files import ImageFiles
from .loader import OnError, SkippingReader

__all__ = ["QUESTION", "Scene", "SceneConfig", "Scenes"]

QUESTION = "Digit while {}?"
# A sound begins up to so many seconds after its moment does.
_DELAY = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """How scenes are made.

    Attributes:
        families: Families of sounds, classes of the recordings.
        num_moments: Pictures of a scene, and sounds; no more than families.
        moment_seconds: Seconds from one to the next.
        silence: Probability that nothing is heard in a moment that is not asked for.
        gain_db: The loudness of sounds is drawn from so many decibels below full scale.
        noise_db: Level of the white noise under them, relative to full scale.
        question: What is asked, with {} for the family.
        num_train: Scenes of an epoch; each epoch has new ones.
        num_val: Scenes to validate on, always the same.
        num_test: Scenes to test on, always the same.
    """

    families: tuple[str, ...] = ("tabla", "ambi", "drum", "bass")
    num_moments: int = 3
    moment_seconds: float = 1.0
    silence: float = 0.5
    gain_db: float = 6.0
    noise_db: float = -50.0
    question: str = QUESTION
    num_train: int = 2048
    num_val: int = 128
    num_test: int = 512

    def __post_init__(self) -> None:
        for name in ("num_moments", "num_train", "num_val", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.num_moments > len(set(self.families)):
            raise ValueError(
                "every moment has another family, got "
                f"num_moments={self.num_moments} and families={', '.join(self.families)}."
            )
        if not 0 <= self.silence <= 1:
            raise ValueError(f"silence must be in [0, 1], got {self.silence}.")
        if self.moment_seconds <= _DELAY:
            raise ValueError(f"moment_seconds must be above {_DELAY}, got {self.moment_seconds}.")
        if self.gain_db < 0 or self.noise_db > 0:
            raise ValueError(
                f"gain_db must be 0 or more and noise_db 0 or less, got gain_db={self.gain_db} and "
                f"noise_db={self.noise_db}."
            )
        if "{}" not in self.question:
            raise ValueError(f"question must have {{}} for the family, got {self.question!r}.")

    @property
    def questions(self) -> dict[str, str]:
        """The question about each family, all of one length: nothing is padding for the model."""
        texts = {family: self.question.format(family) for family in self.families}
        width = max(map(len, texts.values()))
        return {family: text.ljust(width) for family, text in texts.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A sample: inputs by kind of modality, and what they are made of.

    Attributes:
        frames: Pictures in [0, 255], uint8 (moments, channels, height, width), or None.
        waveform: Sound, float32 (samples,), or None.
        question: Text, or None.
        label: Class of the answer.
        name: Of the sample.
        seconds: Time from one picture to the next.
        families: What is heard in each moment, "" for nothing; () where nobody says.
        num_skipped: Files that could not be read for it.
    """

    frames: Tensor | None
    waveform: Tensor | None
    question: str | None
    label: int
    name: str
    seconds: float
    families: tuple[str, ...] = ()
    num_skipped: int = 0


class Scenes:
    """Scenes of the pictures and recordings of a split.

    Args:
        images: The pictures, with their classes.
        sounds: The recordings; in training with their augmentation.
        config: How scenes are made.
        size: Height and width of a frame.
        in_chans: Its channels, 1 or 3.
        number: How many there are.
        on_error: "skip" takes another file for one that cannot be read; "raise" stops at it.
    """

    def __init__(
        self,
        images: ImageFiles,
        sounds: Recordings,
        *,
        config: SceneConfig,
        size: int,
        in_chans: int,
        number: int,
        on_error: OnError,
    ) -> None:
        self._images, self._sounds, self._config = images, sounds, config
        self._size, self._mode = size, "L" if in_chans == 1 else "RGB"
        self._number = number
        self._reader = SkippingReader(
            self._picture, num_samples=len(images), unit="images", on_error=on_error
        )
        self._families = {
            family: _Family(sounds, family, on_error=on_error) for family in config.families
        }

    def __len__(self) -> int:
        return self._number

    def read(self, place: int, rng: np.random.Generator | None = None) -> Scene:
        """Makes a scene.

        Args:
            place: Which one.
            rng: What to draw from in training; None makes the same one every time.

        Raises:
            ValueError: A file cannot be read, and `on_error` is "raise"; or none can.
        """
        config = self._config
        augmentation = None if rng is None else self._sounds.augmentation
        rng = np.random.default_rng(place) if rng is None else rng
        order = rng.permutation(len(config.families))[: config.num_moments]
        asked = int(rng.integers(config.num_moments))
        is_heard = rng.uniform(size=config.num_moments) >= config.silence
        is_heard[asked] = True
        families = tuple(
            config.families[number] if heard else ""
            for number, heard in zip(order, is_heard, strict=True)
        )
        frames, label, num_skipped = [], 0, 0
        for moment in range(config.num_moments):
            found, frame, skipped = self._reader.read_from(int(rng.integers(len(self._images))))
            frames.append(frame)
            num_skipped += skipped
            label = self._images.labels[found] if moment == asked else label
        waveform, skipped = self._mixed(families, augmentation, rng)
        return Scene(
            frames=torch.stack(frames),
            waveform=waveform,
            question=config.questions[families[asked]],
            label=label,
            name=f"scene {place}",
            seconds=config.moment_seconds,
            families=families,
            num_skipped=num_skipped + skipped,
        )

    def _mixed(
        self,
        families: tuple[str, ...],
        augmentation: AudioAugmentationConfig | None,
        rng: np.random.Generator,
    ) -> tuple[Tensor, int]:
        config, rate = self._config, self._sounds.sample_rate
        moment = round(config.moment_seconds * rate)
        noise = rng.standard_normal(moment * len(families), dtype=np.float32)
        mixed = torch.from_numpy(noise * np.float32(10 ** (config.noise_db / 20)))
        num_skipped = 0
        for place, family in enumerate(families):
            if not family:
                continue
            sound, skipped = self._families[family].read(rng)
            num_skipped += skipped
            if augmentation is not None:
                sound = change(sound, augmentation, rng)
            delay = int(rng.uniform(0, _DELAY) * rate)
            sound = sound[: moment - delay]
            gain = 10 ** (-float(rng.uniform(0, config.gain_db)) / 20)
            start = place * moment + delay
            mixed[start : start + len(sound)] += gain * sound / sound.abs().max().clamp(min=1e-6)
        return mixed / mixed.abs().max().clamp(min=1.0), num_skipped

    def _picture(self, place: int) -> Tensor:
        image = self._images.read(place).convert(self._mode)
        if image.size != (self._size, self._size):
            image = image.resize((self._size, self._size))
        pixels = np.array(image)
        return torch.from_numpy(pixels.reshape(self._size, self._size, -1)).permute(2, 0, 1)


class _Family:
    """The recordings of a family, kept in memory once they are read: each is heard many times."""

    def __init__(self, sounds: Recordings, family: str, *, on_error: OnError) -> None:
        own = tuple(x for x in sounds.recordings if x.label == family)
        if not own:
            known = sorted({str(recording.label) for recording in sounds.recordings})
            raise ValueError(
                f"every family needs recordings in every split, got none of {family!r}. There are "
                f"{', '.join(known)}."
            )
        self._sounds = dataclasses.replace(sounds, recordings=own)
        self._reader = SkippingReader(
            self._sounds.read, num_samples=len(own), unit="recordings", on_error=on_error
        )
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def read(self, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Returns a recording, and how many could not be read for it."""
        place = int(rng.integers(len(self._sounds)))
        if place not in self._kept:
            _, sample, skipped = self._reader.read_from(place)
            self._kept[place] = sample.waveform, skipped
        return self._kept[place]
