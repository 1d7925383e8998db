"""Scenes for a multimodal model: composed of pictures and recordings, or out of shards."""

from typing import Any, Literal

import lightning as L
from torch import nn

from longnet_zoo.models import AudioModality, FramesModality

from .audio_files import Recording, load_recordings
from .audio_samples import AudioAugmentationConfig, Recordings
from .data_options import check_fractions, check_least, check_on_error, loader_options
from .image_files import ImageFiles, load_images
from .loader import EndlessLoader, FixedLoader
from .multimodal_loader import EvalScenes, SceneCollator, TrainScenes
from .multimodal_scenes import SceneConfig, Scenes
from .multimodal_shards import SceneCollate, SceneDecoder, filler_scene
from .shard_sources import HeldOutShardConfig, is_sharded, open_shards
from .shards import ShardEvalLoader, ShardLoader

__all__ = ["MultimodalDataModule"]

Split = Literal["train", "val", "test"]
# What scenes have for a model without frames or sound: nobody looks at it.
_ANY_SIZE, _ANY_RATE = 8, 8000


class MultimodalDataModule(L.LightningDataModule):
    """Loads scenes for the modalities of the model: frames, sound and text, or some of them.

    Args:
        source: "scenes", composed of `images` and `recordings`; or shards of samples, as "data/
            train-{000000..000999}.tar" or "hub:NAME" (see `multimodal_shards`).
        images: "digits", or a folder with a subfolder for each class.
        recordings: "samples", or a folder with a subfolder for each family.
        scenes: How scenes are made.
        shards: How shards are read.
        class_names: Names of the classes in shards.
        val_fraction: Share of images and recordings held out for validation.
        test_fraction: Share held out for the test.
        max_seconds: What is heard of a recording at most.
        augmentation: How training recordings are changed; null leaves them.
        batch_size: Scenes in a batch, for each process.
        eval_batch_size: The same without training; null takes `batch_size`.
        on_error: "skip" logs what cannot be read, and goes on; "raise" stops at it.
        seed: Seed of the scenes.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        source: str = "scenes",
        images: str = "digits",
        recordings: str = "samples",
        scenes: SceneConfig = SceneConfig(),  # noqa: B008 - frozen
        shards: HeldOutShardConfig = HeldOutShardConfig(),  # noqa: B008 - frozen
        class_names: list[str] | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        max_seconds: float = 0.8,
        augmentation: AudioAugmentationConfig | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        on_error: Literal["skip", "raise"] = "skip",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.images, self.recordings = source, images, recordings
        self.scenes, self.shards = scenes, shards
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.max_seconds, self.augmentation = max_seconds, augmentation
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.on_error, self.seed, self.num_workers = on_error, seed, num_workers
        self.class_names = None if class_names is None else tuple(class_names)
        self._check()
        self._images: dict[Split, ImageFiles] = {}
        self._recordings: dict[Split, tuple[Recording, ...]] = {}
        self._families: tuple[str, ...] = ()
        self._collate: SceneCollator | None = None

    @property
    def has_test(self) -> bool:
        """Whether there is something to test on."""
        return self._is_held_out("test")

    def setup(self, stage: str, *, model: nn.Module | None = None) -> None:
        """Finds pictures and recordings, and asks the model how it wants them.

        Args:
            stage: "fit", "validate", "test" or "predict".
            model: The model, where there is no Trainer.
        """
        if model is None:
            model = self.trainer.lightning_module.model
        self._collate = SceneCollator(modalities=model.config.parts)
        if is_sharded(self.source) or self._images:
            return
        fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        self.class_names, self._images = load_images(self.images, max_pixels=2**26, **fractions)
        self._families, self._recordings = load_recordings(
            self.recordings,
            val_source=None,
            test_source=None,
            num_families=14,
            class_names=None,
            **fractions,
        )

    def train_dataloader(self) -> EndlessLoader:
        """Returns the loader of training scenes."""
        options = {"batch_size": self.batch_size, "seed": self.seed, **loader_options(self)}
        if is_sharded(self.source):
            return ShardLoader(
                open_shards(self.source),
                self._decoder(),
                collate=SceneCollate(collate=self._collator()),
                batches_per_epoch=self.shards.batches_per_epoch,
                shuffle=self.shards.shuffle,
                on_error=self.on_error,
                **options,
            )
        repeat = 0 if self.trainer is None else self.trainer.overfit_batches
        return TrainScenes(self._scenes("train"), self._collator(), repeat=repeat, **options)

    def val_dataloader(self) -> FixedLoader | list[Any]:
        """Returns the loader of validation scenes; nothing if none are held out."""
        return self._eval_loader("val") if self._is_held_out("val") else []

    def test_dataloader(self) -> FixedLoader:
        """Returns the loader of test scenes.

        Raises:
            ValueError: Nothing is held out.
        """
        if not self.has_test:
            raise ValueError(
                f"the test needs scenes, got source={self.source!r}, test_fraction="
                f"{self.test_fraction} and shards.test={self.shards.test}. Set them, or validate "
                "instead."
            )
        return self._eval_loader("test")

    def predict_dataloader(self) -> FixedLoader:
        """Returns the loader of the test scenes."""
        return self.test_dataloader()

    def _is_held_out(self, split: Split) -> bool:
        if is_sharded(self.source):
            return getattr(self.shards, split) is not None
        return bool(self._images[split]) and bool(self._recordings[split])

    def _eval_loader(self, split: Split) -> FixedLoader:
        options = loader_options(self)
        options["batch_size"] = self.eval_batch_size or self.batch_size
        if not is_sharded(self.source):
            return EvalScenes(self._scenes(split), self._collator(), **options)
        decoder = self._decoder()
        return ShardEvalLoader(
            open_shards(getattr(self.shards, split)),
            decoder,
            filler=filler_scene(decoder),
            collate=SceneCollate(collate=self._collator()),
            max_samples=self.shards.max_eval_samples,
            on_error=self.on_error,
            **options,
        )

    def _scenes(self, split: Split) -> Scenes:
        size, in_chans, rate = self._wishes()
        sounds = Recordings(
            recordings=self._recordings[split],
            class_names=self._families,
            sample_rate=rate or _ANY_RATE,
            max_seconds=self.max_seconds,
            augmentation=self.augmentation if split == "train" else None,
        )
        numbers = {name: getattr(self.scenes, f"num_{name}") for name in ("train", "val", "test")}
        return Scenes(
            self._images[split],
            sounds,
            config=self.scenes,
            size=size or _ANY_SIZE,
            in_chans=in_chans,
            number=numbers[split],
            on_error=self.on_error,
        )

    def _decoder(self) -> SceneDecoder:
        size, in_chans, rate = self._wishes()
        if self.class_names is None:
            raise ValueError("shards need the names of their classes, got class_names=None.")
        return SceneDecoder(
            class_names=self.class_names,
            size=size,
            in_chans=in_chans,
            sample_rate=rate,
            seconds=self.scenes.moment_seconds,
        )

    def _wishes(self) -> tuple[int | None, int, int | None]:
        """Returns size and channels of a frame and the sample rate of the model."""
        frames, audio = (self._collator().part(kind) for kind in (FramesModality, AudioModality))
        size, in_chans = (None, 1) if frames is None else (frames.img_size, frames.in_chans)
        return size, in_chans, None if audio is None else audio.sample_rate

    def _collator(self) -> SceneCollator:
        assert self._collate is not None
        return self._collate

    def _check(self) -> None:
        check_fractions(val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        check_least(
            batch_size=(self.batch_size, 1),
            eval_batch_size=(self.eval_batch_size, 1),
            num_workers=(self.num_workers, 0),
            seed=(self.seed, 0),
        )
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds}.")
        check_on_error(self.on_error)
