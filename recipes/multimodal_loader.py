"""Batches of scenes, in an order that resumes anywhere.

A batch is a dict: `inputs`, the input of each modality by name, `times` and `padding_masks` of
those that have some, `present`, whether each sample has a modality, as `LongNetMultimodal` takes
them; `labels` (b,) int64; `names`, `questions`, `families` and `moment_seconds`, lists of b, for
people; and `num_skipped`, the files that could not be read for it. A scene depends on seed, epoch
and its place alone, so the number of worker processes changes nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from longnet_zoo.models import AudioModality, FramesModality, ModalityConfig, TextModality

from .classification_metrics import UNLABELLED
from .loader import FILLER, Batch, EpochOrder, FixedLoader, SeededLoader, fair_order
from .multimodal_scenes import Scene, Scenes

__all__ = ["EvalScenes", "SceneCollator", "TrainScenes", "pixels"]

# Pixels and bytes as the model gets them.
_PIXEL_MEAN, _PIXEL_STD = 127.5, 127.5
_PAD_ID = 258


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneCollator:
    """Makes batches of scenes for the modalities of a model.

    Attributes:
        modalities: Those of the model: frames, audio and text, one of a kind at most.
    """

    modalities: tuple[ModalityConfig, ...]

    def __post_init__(self) -> None:
        kinds = [modality.kind for modality in self.modalities]
        known = ("frames", "audio", "text")
        if len(set(kinds)) < len(kinds) or not set(kinds) <= set(known):
            raise ValueError(
                f"scenes have the kinds {', '.join(known)}, got a model with modalities of the "
                f"kinds {', '.join(kinds)}. Leave others out, and take one of a kind."
            )

    def part(self, kind: type[ModalityConfig]) -> Any:
        """Returns the modality of a kind, or None."""
        return next((part for part in self.modalities if type(part) is kind), None)

    def __call__(self, scenes: Sequence[Scene]) -> Batch:
        """Makes a batch."""
        inputs: dict[str, Tensor] = {}
        times: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        present: dict[str, list[bool]] = {}
        for modality in self.modalities:
            own = [self._values(modality, scene) for scene in scenes]
            has = torch.tensor([x is not None for x in own])
            if not has.any():
                continue
            example = next(x for x in own if x is not None)
            rows = [example[:1] if x is None else x for x in own]
            lengths = torch.tensor([len(x) for x in rows])
            padding = _PAD_ID if isinstance(modality, TextModality) else 0
            name = modality.name
            inputs[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
            masks[name] = torch.arange(int(lengths.max())) >= lengths[:, None]
            present[name] = has.tolist()
            if isinstance(modality, FramesModality):
                # In the middle of their moments.
                seconds = torch.tensor([scene.seconds for scene in scenes])
                places = torch.arange(int(lengths.max())) + 0.5
                times[name] = seconds[:, None] * places
        return {
            "inputs": inputs,
            "times": times,
            "padding_masks": {name: mask for name, mask in masks.items() if mask.any()},
            "present": present,
            "labels": torch.tensor([scene.label for scene in scenes]),
            "names": [scene.name for scene in scenes],
            "questions": [(scene.question or "").strip() for scene in scenes],
            "families": [list(scene.families) for scene in scenes],
            "moment_seconds": [scene.seconds for scene in scenes],
            "num_skipped": torch.tensor(sum(scene.num_skipped for scene in scenes)),
        }

    @staticmethod
    def _values(modality: ModalityConfig, scene: Scene) -> Tensor | None:
        """Returns what a scene has of a modality, (units, ...), or None."""
        if isinstance(modality, FramesModality):
            frames = scene.frames
            return None if frames is None else (frames.float() - _PIXEL_MEAN) / _PIXEL_STD
        if isinstance(modality, AudioModality):
            return scene.waveform
        if scene.question is None:
            return None
        return torch.tensor(list(scene.question.encode()), dtype=torch.int64)


class TrainScenes(SeededLoader):
    """Yields epoch after epoch of new scenes, which depend on seed, epoch and place.

    Args:
        scenes: Makes them.
        collate: Makes batches of them.
        batch_size: Scenes in a batch, for each rank.
        seed: Seed of the scenes.
        options: Further ones of `SeededLoader`.
    """

    def __init__(
        self, scenes: Scenes, collate: SceneCollator, *, batch_size: int, seed: int, **options: Any
    ) -> None:
        super().__init__(
            _TrainBatches(scenes, collate, seed=seed),
            num_samples=len(scenes),
            unit="scenes",
            order={"num_scenes": len(scenes)},
            batch_size=batch_size,
            seed=seed,
            **options,
        )


class EvalScenes(FixedLoader):
    """Yields the same scenes every time, and as many batches on every rank.

    Args:
        scenes: Makes them.
        collate: Makes batches of them.
        options: Further ones of `FixedLoader`.
    """

    def __init__(self, scenes: Scenes, collate: SceneCollator, **options: Any) -> None:
        super().__init__(_EvalBatches(scenes, collate), fair_order(len(scenes)), **options)


class _TrainBatches(Dataset[Batch]):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of scenes)."""

    def __init__(self, scenes: Scenes, collate: SceneCollator, *, seed: int) -> None:
        self._scenes, self._collate, self._seed = scenes, collate, seed
        self._order = EpochOrder(len(scenes), seed=seed)

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        places = self._order.samples(epoch, first=first, count=count)
        rngs = (np.random.default_rng((self._seed, epoch, place)) for place in places)
        return self._collate(
            [self._scenes.read(place, rng) for place, rng in zip(places, rngs, strict=True)]
        )


class _EvalBatches(Dataset[Batch]):
    """Makes the batch of a request, a list of places."""

    def __init__(self, scenes: Scenes, collate: SceneCollator) -> None:
        self._scenes, self._collate = scenes, collate

    def __getitem__(self, request: list[int]) -> Batch:
        return self._collate([self._scene(place) for place in request])

    def _scene(self, place: int) -> Scene:
        if place != FILLER:
            return self._scenes.read(place)
        # One that counts for nothing evens out the ranks.
        return dataclasses.replace(self._scenes.read(0), label=UNLABELLED, name="", num_skipped=0)


def pixels(frames: Tensor) -> Tensor:
    """Makes pictures to look at, in [0, 255], of the frames that a model gets."""
    return (frames.float().cpu() * _PIXEL_STD + _PIXEL_MEAN).clamp(0, 255)
