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
from .loader import (
    Batch,
    FixedLoader,
    OnError,
    SeededLoader,
    fair_order,
)
from .sample_batches import EvalBatches, TrainBatches

__all__ = ["FILLER_SAMPLE", "AudioSamples", "EvalAudio", "TrainAudio", "collate"]

# Stands for a sample that is missing; without a name, so that nobody prints it.
FILLER_SAMPLE = AudioSample(waveform=torch.zeros(4096), name="")


class AudioSamples(Protocol):
    """Samples that are read one at a time: `Recordings` or `Soundscapes`."""

    def __len__(self) -> int: ...

    def read(self, place: int, rng: np.random.Generator | None = None) -> AudioSample:
        """Returns a sample, drawn from `rng` in training."""
        ...


class TrainAudio(SeededLoader):
    """Yields epoch after epoch, each in an order that depends on seed and epoch.

    Args:
        source: The samples.
        batch_size: Samples in a batch, for each rank.
        seed: Seed of the order and of what is drawn for a sample.
        on_error: "skip" takes the next sample for one that cannot be read; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share an epoch.
        repeat: Batches, or share of an epoch, to repeat over and over
            (`Trainer.overfit_batches`); 0 for what all others want.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.

    Raises:
        ValueError: There are fewer samples than one step takes.
    """

    def __init__(
        self,
        source: AudioSamples,
        *,
        batch_size: int,
        seed: int = 0,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        repeat: int | float = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            TrainBatches(
                functools.partial(_draw, source),
                collate=collate,
                num_samples=len(source),
                unit="recordings",
                seed=seed,
                on_error=on_error,
            ),
            num_samples=len(source),
            unit="recordings",
            order={"num_recordings": len(source)},
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            repeat=repeat,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class EvalAudio(FixedLoader):
    """Yields every sample once as it is, in an order that is mixed but always the same.

    So a limit on the number of batches takes a fair sample. Every rank gets as many batches, and
    where samples are missing, one that counts for nothing.

    Args:
        source: The samples.
        batch_size: Samples in a batch, for each rank.
        is_mixed: Whether the order is mixed.
        on_error: "skip" counts a sample that cannot be read for nothing; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share the samples.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
    """

    def __init__(
        self,
        source: AudioSamples,
        *,
        batch_size: int,
        is_mixed: bool = True,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            EvalBatches(
                source.read,
                collate=collate,
                filler=_filler,
                num_samples=len(source),
                unit="recordings",
                on_error=on_error,
            ),
            fair_order(len(source)) if is_mixed else range(len(source)),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
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


def _draw(source: AudioSamples, place: int, seed: tuple[int, ...]) -> AudioSample:
    return source.read(place, np.random.default_rng(seed))


def _filler() -> AudioSample:
    return FILLER_SAMPLE
