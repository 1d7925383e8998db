"""Batches of sound, in an order that resumes anywhere.

A batch is a dict: `waveform` (b, samples) float32, `lengths` (b,) int64 how many of these are
real, `labels` (b,) int64, `events`, a list of b tensors (k, 3) of start, end and class or None,
`transcripts` and `names`, lists of b, and `num_skipped`, the files that could not be read for it.
What a sample sounds like depends on seed, epoch and its place alone, so the number of worker
processes changes nothing.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .audio_samples import AudioSample
from .loader import Batch
from .sample_loader import SampleSource, Seed

__all__ = ["FILLER_SAMPLE", "AudioSamples", "audio_source", "collate"]

# Stands for a sample that is missing; without a name, so that nobody prints it.
FILLER_SAMPLE = AudioSample(waveform=torch.zeros(4096), name="")


class AudioSamples(Protocol):
    """Samples that are read one at a time: `Recordings` or `Soundscapes`."""

    def __len__(self) -> int: ...

    def read(self, place: int, rng: np.random.Generator | None = None) -> AudioSample:
        """Returns a sample, drawn from `rng` in training."""
        ...


def audio_source(samples: AudioSamples) -> SampleSource[AudioSample]:
    """Returns samples as loaders take them."""
    return SampleSource(
        read=functools.partial(_read, samples),
        collate=collate,
        filler=_filler,
        num_samples=len(samples),
        unit="recordings",
    )


def collate(samples: Sequence[AudioSample], *, num_skipped: int = 0) -> Batch:
    """Makes a batch of samples, padded at their end.

    Args:
        samples: The samples.
        num_skipped: How many could not be read beside them.
    """
    return {
        "waveform": pad_sequence([sample.waveform for sample in samples], batch_first=True),
        "lengths": torch.tensor([len(sample.waveform) for sample in samples]),
        "labels": torch.tensor([sample.label for sample in samples]),
        "events": [sample.events for sample in samples],
        "transcripts": [sample.transcript for sample in samples],
        "names": [sample.name for sample in samples],
        "num_skipped": torch.tensor(num_skipped + sum(sample.num_skipped for sample in samples)),
    }


def _read(samples: AudioSamples, place: int, seed: Seed) -> AudioSample:
    return samples.read(place, None if seed is None else np.random.default_rng(seed))


def _filler() -> AudioSample:
    return FILLER_SAMPLE
