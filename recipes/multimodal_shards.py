"""Scenes from shards, in which any modality of a sample may be missing.

A sample has any of: a strip of square pictures side by side as `.png`, `.jpg` or `.webp`, sound as
`.flac`, `.ogg`, `.wav` or `.mp3`, a question as `.txt`; and the name or number of its class as
`.cls`. In a Hugging Face dataset these are columns of the names `png`, `flac`, `txt` and `cls`.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longnet_zoo.models.audio_files import read_audio

from .classification_metrics import UNLABELLED
from .image_files import read_image
from .loader import Batch
from .multimodal_loader import SceneCollator
from .multimodal_scenes import Scene

__all__ = ["SceneCollate", "SceneDecoder", "filler_scene"]

_PICTURES, _SOUNDS = ("png", "jpg", "jpeg", "webp"), ("flac", "ogg", "wav", "mp3")
_MAX_PIXELS = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneDecoder:
    """Makes a scene of a shard's sample.

    Attributes:
        class_names: Names of the classes.
        size: Height and width of a frame for the model; None reads no pictures.
        in_chans: Channels of a frame.
        sample_rate: Samples a second for the model; None reads no sound.
        seconds: Time from one picture to the next.
    """

    class_names: tuple[str, ...]
    size: int | None
    in_chans: int
    sample_rate: int | None
    seconds: float

    def __call__(self, sample: Any) -> dict[str, Any]:
        """Returns the scene as a dict.

        Raises:
            ValueError: There is no class, or nothing to judge it by, or a part is damaged.
            OSError: The picture cannot be read.
        """
        label = sample["cls"]
        text = label.decode() if isinstance(label, bytes) else str(label)
        has_picture = self.size is not None and any(name in sample for name in _PICTURES)
        has_sound = self.sample_rate is not None and any(name in sample for name in _SOUNDS)
        question = sample.get("txt")
        question = question.decode() if isinstance(question, bytes) else question
        if not isinstance(question, str | None):
            raise ValueError(f"its question must be text, got {question!r}"[:200])
        if not (has_picture or has_sound or question):
            raise ValueError(f"it needs one of {', '.join((*_PICTURES, *_SOUNDS, 'txt'))}")
        waveform = None
        if has_sound and self.sample_rate is not None:
            waveform = read_audio(sample.file(*_SOUNDS), sample_rate=self.sample_rate)
        return {
            "scene": Scene(
                frames=self._frames(sample.file(*_PICTURES)) if has_picture else None,
                waveform=waveform,
                question=question or None,
                label=self._label(text.strip()),
                name=sample["__key__"],
                seconds=self.seconds,
            )
        }

    def _frames(self, content: bytes) -> Tensor:
        strip = read_image(io.BytesIO(content), max_pixels=_MAX_PIXELS)
        if strip.width % strip.height:
            raise ValueError(
                "its picture must be square frames side by side, got "
                f"{strip.width} x {strip.height} pixels"
            )
        assert self.size is not None
        number = strip.width // strip.height
        strip = strip.convert("L" if self.in_chans == 1 else "RGB")
        strip = strip.resize((number * self.size, self.size), Image.Resampling.BICUBIC)
        pixels = np.array(strip).reshape(self.size, number, self.size, -1)
        return torch.from_numpy(pixels).permute(1, 3, 0, 2)

    def _label(self, text: str) -> int:
        if text in self.class_names:
            return self.class_names.index(text)
        if not text.isdigit() or int(text) >= len(self.class_names):
            raise ValueError(
                f"its class must be one of {', '.join(self.class_names)} or a number below "
                f"{len(self.class_names)}, got {text!r}"
            )
        return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneCollate:
    """Makes a batch of what `SceneDecoder` returns; the loader counts what was skipped.

    Attributes:
        collate: Makes batches of scenes.
    """

    collate: SceneCollator

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Returns the batch."""
        batch = self.collate([sample["scene"] for sample in samples])
        return {name: value for name, value in batch.items() if name != "num_skipped"}


def filler_scene(decoder: SceneDecoder) -> dict[str, Any]:
    """Makes what stands for a missing sample: a scene that counts for nothing."""
    size, rate = decoder.size, decoder.sample_rate
    frames = None if size is None else torch.zeros(1, decoder.in_chans, size, size).byte()
    return {
        "scene": Scene(
            frames=frames,
            waveform=None if rate is None else torch.zeros(rate),
            question="?",
            label=UNLABELLED,
            name="",
            seconds=decoder.seconds,
        )
    }
