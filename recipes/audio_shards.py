"""Audio from shards of tar files, as webdataset lays them out.

A sample of a shard has sound as `.wav`, `.flac`, `.ogg`, `.opus` or `.mp3`, and beside it one of

    .cls    its class, by number or name
    .txt    its transcript
    .json   {"label": ...}, {"transcript": ...} or {"events": [{"tag": ..., "start": ..., "end":
            ...}]}, with seconds
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longnet_zoo.models.audio_files import read_audio

from .audio_files import Event, Recording
from .audio_loader import FILLER_SAMPLE, collate
from .audio_samples import AudioAugmentationConfig, AudioSample, augment, make_sample
from .loader import Batch

__all__ = ["ShardDecoder", "collate_shards", "shard_filler"]

_SOUNDS = ("wav", "flac", "ogg", "opus", "mp3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardDecoder:
    """Makes a sample for a model of a shard's sample.

    Attributes:
        needs: What must be known of a sample, "label" or "events"; None for anything.
        class_names: Names of the classes; () for transcripts.
        sample_rate: Samples a second, to which all are brought.
        max_seconds: What is taken of a longer one: a part at random in training, else its front;
            None takes all. A longer one with a transcript is refused.
        augmentation: How training samples are changed; None leaves them alone.
        is_training: Whether to draw at random, from NumPy's generator.
    """

    needs: Literal["label", "events"] | None = None
    class_names: tuple[str, ...]
    sample_rate: int
    max_seconds: float | None
    augmentation: AudioAugmentationConfig | None
    is_training: bool

    def __call__(self, parts: Any) -> dict[str, Any]:
        """Returns the fields of an `AudioSample`.

        Raises:
            ValueError: A part is missing, or is not what it should be.
            OSError: The sound cannot be read.
        """
        recording = _recording(parts, self.class_names)
        if self.needs is not None and getattr(recording, self.needs) is None:
            raise ValueError(f"it has no {self.needs}")
        waveform = read_audio(parts.first(*_SOUNDS), sample_rate=self.sample_rate)
        rng = np.random.default_rng(np.random.randint(2**31)) if self.is_training else None
        room = math.inf if self.max_seconds is None else round(self.max_seconds * self.sample_rate)
        start, spare = 0, len(waveform) - room
        if spare > 0:
            if recording.transcript is not None:
                raise ValueError(
                    f"a recording with a transcript may have {self.max_seconds} seconds, got "
                    f"{len(waveform) / self.sample_rate:.1f}"
                )
            start = 0 if rng is None else int(rng.integers(0, int(spare) + 1))
            waveform = waveform[start : start + int(room)]
        sample = make_sample(
            waveform,
            recording,
            class_names=self.class_names,
            sample_rate=self.sample_rate,
            offset=start / self.sample_rate,
        )
        if rng is not None and self.augmentation is not None:
            shift = room - len(waveform)
            sample = augment(sample, self.augmentation, rng, max_shift=shift, rate=self.sample_rate)
        return _fields(sample)


def collate_shards(samples: Sequence[dict[str, Any]]) -> Batch:
    """Makes a batch of what `ShardDecoder` returns."""
    return collate([AudioSample(**sample) for sample in samples])


def shard_filler() -> dict[str, Any]:
    """Returns what stands for a sample that is missing, and counts for nothing."""
    return _fields(FILLER_SAMPLE)


def _recording(parts: Any, class_names: tuple[str, ...]) -> Recording:
    key = Path(parts["__key__"]).name
    known: dict[str, Any] = {}
    if "cls" in parts:
        known["label"] = _text(parts["cls"])
    elif "txt" in parts:
        known["transcript"] = _text(parts["txt"])
    else:
        try:
            known = json.loads(_text(parts.first("cls", "txt", "json")))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"its json is none: {error}") from error
    if not isinstance(known, dict):
        raise ValueError(f"its json must be an object, got {known!r}"[:200])
    label = known.get("label")
    if label is not None and str(label).isdecimal() and str(label) not in class_names:
        number = int(label)
        if number >= len(class_names):
            raise ValueError(f"there are {len(class_names)} classes, got the class {number}")
        label = class_names[number]
    if not isinstance(known.get("transcript"), str | None):
        raise ValueError(f"its transcript must be text, got {known['transcript']!r}"[:200])
    if label is None and known.get("transcript") is None and known.get("events") is None:
        raise ValueError("it has no label, no transcript and no events")
    return Recording(
        path=key,
        key=key,
        label=None if label is None else str(label),
        events=None if known.get("events") is None else _events(known["events"]),
        transcript=known.get("transcript"),
    )


def _events(rows: Any) -> tuple[Event, ...]:
    try:
        events = tuple(
            Event(tag=str(row["tag"]), start=float(row["start"]), end=float(row["end"]))
            for row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"events need tag, start and end, got {rows!r}"[:200]) from error
    for event in events:
        if not 0 <= event.start < event.end < math.inf:
            raise ValueError(
                "an event needs seconds, 0 or more, with its start before its end, got "
                f"{event.start} and {event.end} for {event.tag!r}"
            )
    return events


def _text(part: bytes) -> str:
    # Not UTF-8 is a ValueError, too.
    return part.decode("utf-8").strip()


def _fields(sample: AudioSample) -> dict[str, Any]:
    return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
