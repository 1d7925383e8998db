"""Audio for classification, tagging and transcription: recordings, or soundscapes mixed of them."""

import dataclasses
from collections import Counter
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from .audio_files import Recording, Split, find_audio, load_recordings
from .audio_loader import AudioSamples, audio_source
from .audio_samples import AudioAugmentationConfig, Recordings
from .audio_shards import ShardDecoder, collate_shards, shard_filler
from .audio_soundscapes import SoundscapeConfig, Soundscapes
from .data_options import check_fractions, check_least, check_on_error, loader_options
from .sample_loader import EvalLoader, TrainLoader
from .shard_sources import ShardConfig, is_tar
from .shards import ShardEvalLoader, ShardLoader

__all__ = ["AudioDataModule"]


class AudioDataModule(L.LightningDataModule):
    """Loads recordings at the sample rate of the model.

    Args:
        source: "samples" (165 single sounds and loops that come with the recipe), a folder with a
            subfolder for each class, or one with such folders in `train`, `val` and `test`, or a
            table (see `audio_tables`); or shards, such as `train-{0000..0999}.tar` (see
            `audio_shards`).
        val_source: Validation recordings, a folder, table or shards; null takes those of `source`,
            of shards none.
        test_source: Test recordings likewise.
        predict_source: What `predict` reads: a folder of audio files, or one; null takes the test
            recordings.
        num_families: How many of the largest families of "samples" are used.
        class_names: The classes in their order, needed for shards with classes; null takes those
            of the training recordings.
        shards: How shards are read.
        soundscapes: How soundscapes are mixed of the recordings of each split; null takes the
            recordings themselves.
        max_seconds: What is read of a longer recording in training: a part at random; or its
            front, where it goes into a soundscape or `eval_seconds` is null. Null reads all.
        eval_seconds: What is read without training, from the front; null takes `max_seconds`.
        val_fraction: Share of the recordings held out for validation.
        test_fraction: Share held out for the test.
        batch_size: Recordings in a batch, for each process.
        eval_batch_size: The same without training; null takes `batch_size`.
        augmentation: How training recordings are changed; null leaves them alone.
        on_error: "skip" logs recordings that cannot be read, and goes on; "raise" stops at them.
        seed: Seed of order, augmentation and soundscapes.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        source: str = "samples",
        val_source: str | None = None,
        test_source: str | None = None,
        predict_source: str | None = None,
        num_families: int = 8,
        class_names: list[str] | None = None,
        shards: ShardConfig = ShardConfig(),  # noqa: B008 - frozen
        soundscapes: SoundscapeConfig | None = None,
        max_seconds: float | None = None,
        eval_seconds: float | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        augmentation: AudioAugmentationConfig | None = AudioAugmentationConfig(),  # noqa: B008
        on_error: Literal["skip", "raise"] = "skip",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.val_source, self.test_source = source, val_source, test_source
        self.predict_source = predict_source
        self.num_families = num_families
        self._given_names = class_names
        self.shards, self.soundscapes = shards, soundscapes
        self.max_seconds, self.eval_seconds = max_seconds, eval_seconds
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.augmentation = augmentation
        self.on_error, self.seed, self.num_workers = on_error, seed, num_workers
        self._check()
        self.class_names: tuple[str, ...] | None = None
        self._needs: Literal["label", "events"] | None = None
        self._recordings: dict[Split, tuple[Recording, ...]] = {}
        self._sample_rate = 0

    @property
    def class_counts(self) -> list[int]:
        """Number of training recordings of each class."""
        if self._is_sharded:
            raise ValueError(
                "nobody knows how many training recordings of a class are in shards, got "
                f"source={self.source!r}. Pass model.class_weights as numbers, or null."
            )
        counts = Counter(name for x in self._recordings["train"] for name in x.classes)
        return [counts[name] for name in self.class_names or ()]

    @property
    def has_test(self) -> bool:
        """Whether there are test recordings."""
        return bool(self.test_source if self._is_sharded else self._recordings["test"])

    def setup(self, stage: str, *, model: nn.Module | None = None) -> None:
        """Finds the recordings, and asks the model for its sample rate.

        Args:
            stage: "fit", "validate", "test" or "predict".
            model: The model, where there is no Trainer.
        """
        if model is None:
            model = self.trainer.lightning_module.model
        self._sample_rate = model.config.sample_rate
        # A folder to predict from may be all that there is.
        if self._recordings or (stage == "predict" and self.predict_source is not None):
            return
        if self._is_sharded:
            self.class_names = tuple(self._given_names or ()) or None
            return
        classes, self._recordings = load_recordings(
            self.source,
            val_source=self.val_source,
            test_source=self.test_source,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            num_families=self.num_families,
            class_names=self._given_names,
        )
        # Transcripts have none.
        self.class_names = classes or None
        if self.soundscapes is not None and any(x.label is None for x in self._recordings["train"]):
            raise ValueError(
                f"soundscapes are mixed of recordings with a class, got {self.source!r} with "
                "events or transcripts. Leave data.soundscapes out."
            )
        sizes = ", ".join(f"{split} {len(own):,}" for split, own in self._recordings.items())
        rank_zero_info(f"recordings from {self.source!r}: {sizes}")

    def require(self, part: Literal["label", "events"]) -> None:
        """Refuses recordings without what a task learns from; of shards when they are read.

        Args:
            part: What must be known of each recording; soundscapes bring events.

        Raises:
            ValueError: It is not known of one.
        """
        self._needs = part
        mixed = "events" if self.soundscapes is not None else None
        for recording in (x for own in self._recordings.values() for x in own):
            if part != mixed and (mixed or getattr(recording, part) is None):
                kinds = ("label", "events", "transcript")
                known = mixed or next(x for x in kinds if getattr(recording, x) is not None)
                raise ValueError(
                    f"this task needs the {part} of every recording, got {known} of "
                    f"{recording.path}. audio_classification takes labels, audio_tagging events, "
                    "or labels with data.soundscapes."
                )

    def train_dataloader(self) -> TrainLoader | ShardLoader:
        """Returns the loader of augmented recordings, or of ever new soundscapes."""
        if self._is_sharded:
            return ShardLoader(
                self.source,
                self._decoder(is_training=True),
                batch_size=self.batch_size,
                collate=collate_shards,
                batches_per_epoch=self.shards.batches_per_epoch,
                shuffle=self.shards.shuffle,
                seed=self.seed,
                **self._loader_options(),
            )
        return TrainLoader(
            audio_source(self._samples("train", is_training=True)),
            batch_size=self.batch_size,
            seed=self.seed,
            repeat=0 if self.trainer is None else self.trainer.overfit_batches,
            **self._loader_options(),
        )

    def val_dataloader(self) -> EvalLoader | ShardEvalLoader | list[Any]:
        """Returns the loader of validation recordings; nothing if none are held out."""
        has_val = self.val_source if self._is_sharded else self._recordings["val"]
        return self._eval_loader("val") if has_val else []

    def test_dataloader(self) -> EvalLoader | ShardEvalLoader:
        """Returns the loader of test recordings."""
        if not self.has_test:
            raise ValueError(
                f"the test needs recordings, got source={self.source!r} without those of a split "
                f"'test' and test_fraction={self.test_fraction}. Pass data.test_source, or "
                "validate instead."
            )
        return self._eval_loader("test")

    def plain_train_dataloader(self, max_samples: int) -> EvalLoader | ShardEvalLoader:
        """Returns the loader of training samples as an evaluation would see them.

        Args:
            max_samples: Takes so many of a shard at most; of other sources all.
        """
        if self._is_sharded:
            return self._shard_loader(self.source, max_samples)
        return self._eval_loader("train")

    def predict_dataloader(self) -> EvalLoader | ShardEvalLoader:
        """Returns the loader of the recordings of `predict_source`, in their order."""
        if self.predict_source is None:
            return self.test_dataloader()
        samples = Recordings(
            recordings=find_audio(self.predict_source),
            class_names=(),
            sample_rate=self._sample_rate,
            max_seconds=self._longest(is_training=False),
        )
        return EvalLoader(
            audio_source(samples),
            batch_size=self.eval_batch_size or self.batch_size,
            places=range(len(samples)),
            **self._loader_options(),
        )

    @property
    def _is_sharded(self) -> bool:
        return is_tar(self.source)

    def _decoder(self, *, is_training: bool) -> ShardDecoder:
        if self._needs is not None and not self.class_names:
            raise ValueError(
                f"shards need the names of their classes, got class_names={self.class_names} and "
                f"source={self.source!r}. Pass data.class_names in their order."
            )
        return ShardDecoder(
            needs=self._needs,
            class_names=self.class_names or (),
            sample_rate=self._sample_rate,
            max_seconds=self._longest(is_training=is_training),
            augmentation=self.augmentation if is_training else None,
            is_training=is_training,
        )

    def _shard_loader(self, source: str, max_samples: int | None) -> ShardEvalLoader:
        return ShardEvalLoader(
            source,
            self._decoder(is_training=False),
            filler=shard_filler(),
            batch_size=self.eval_batch_size or self.batch_size,
            collate=collate_shards,
            max_samples=max_samples,
            **self._loader_options(),
        )

    def _eval_loader(self, split: Split) -> EvalLoader | ShardEvalLoader:
        if self._is_sharded:
            source = getattr(self, f"{split}_source")
            return self._shard_loader(source, self.shards.max_eval_samples)
        return EvalLoader(
            audio_source(self._samples(split, is_training=False)),
            batch_size=self.eval_batch_size or self.batch_size,
            **self._loader_options(),
        )

    def _samples(self, split: Split, *, is_training: bool) -> AudioSamples:
        recordings = Recordings(
            recordings=self._recordings[split],
            class_names=self.class_names or (),
            sample_rate=self._sample_rate,
            max_seconds=self._longest(is_training=is_training),
            augmentation=self.augmentation if is_training else None,
        )
        if self.soundscapes is None:
            return recordings
        return Soundscapes(
            dataclasses.replace(recordings, max_seconds=self.max_seconds),
            config=self.soundscapes,
            number=getattr(self.soundscapes, f"num_{split}"),
            on_error=self.on_error,
        )

    def _longest(self, *, is_training: bool) -> float | None:
        return self.max_seconds if is_training or self.eval_seconds is None else self.eval_seconds

    def _loader_options(self) -> dict[str, Any]:
        return {"on_error": self.on_error, **loader_options(self)}

    def _check(self) -> None:
        check_fractions(val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        for name in ("max_seconds", "eval_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.soundscapes is not None and self.eval_seconds is not None:
            raise ValueError(
                "soundscapes are as long without training as with it, got eval_seconds="
                f"{self.eval_seconds}. Leave it out."
            )
        sources = [x for x in (self.source, self.val_source, self.test_source) if x is not None]
        if self._is_sharded and not all(map(is_tar, sources)):
            raise ValueError(f"with shards all sources must be shards, got {', '.join(sources)}.")
        if self._is_sharded and self.soundscapes is not None:
            raise ValueError(
                f"soundscapes are mixed of files, got source={self.source!r}. Unpack the shards, "
                "or leave data.soundscapes out."
            )
        check_least(
            batch_size=(self.batch_size, 1),
            eval_batch_size=(self.eval_batch_size, 1),
            num_workers=(self.num_workers, 0),
            seed=(self.seed, 0),
        )
        check_on_error(self.on_error)
