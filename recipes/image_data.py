"""Images for classification: the digits that come with the recipe, or a folder of pictures."""

import dataclasses
import math
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from timm.data import create_transform, resolve_data_config
from torch import nn

from .classification_metrics import UNLABELLED
from .data_options import check_fractions, check_least, check_on_error, loader_options
from .image_files import ImageFiles, Split, find_images, load_images
from .image_loader import Transform, image_source
from .sample_loader import EvalLoader, TrainLoader

__all__ = ["AugmentationConfig", "ImageDataModule"]

_DATA_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# What timm reads.
_CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How timm's `create_transform` changes a training image.

    Attributes:
        scale: Least and greatest share of the image's area that a random crop keeps.
        ratio: Least and greatest change of width / height by that crop.
        hflip: Probability of a left-right flip; 0 where it changes the class, as with digits.
        vflip: Probability of an upside-down flip.
        color_jitter: Greatest relative change of brightness, contrast and saturation.
        auto_augment: timm's name of a policy, such as "rand-m9-mstd0.5-inc1" for RandAugment.
        erasing: Probability that a rectangle is replaced by noise.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    erasing: float = 0.0

    def __post_init__(self) -> None:
        for name, top in (("scale", 1.0), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(
                    f"{name} must be two numbers, 0 < low <= high <= {top}, got {(low, high)}."
                )
        for name in ("hflip", "vflip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter must be 0 or more, got {self.color_jitter}.")
        try:
            create_transform((3, 8, 8), is_training=True, auto_augment=self.auto_augment)
        # timm asserts, and fails to convert what it has split.
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                "auto_augment must be a policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m5-w4 "
                f"or original, got {self.auto_augment!r} ({error})."
            ) from error


class ImageDataModule(L.LightningDataModule):
    """Loads images in the size and with the normalisation that the model asks for.

    Args:
        source: "digits", or a folder with a subfolder for each class, or one with such folders in
            `train`, `val` and `test`.
        predict_source: What `predict` classifies: a folder of images, or one image; null takes
            the test images.
        val_fraction: Share of the images held out for validation where there is no folder `val`.
        test_fraction: Share held out for the test where there is no folder `train`.
        batch_size: Images in a batch, for each process.
        eval_batch_size: The same without training; null takes `batch_size`.
        augmentation: How training images are changed.
        data_config: Settings of timm's data configuration that differ from the model's:
            `input_size` (channels, height, width), `mean`, `std`, `interpolation`, `crop_pct` or
            `crop_mode`.
        on_error: "skip" logs images that cannot be read, have more than 8 bits a channel or more
            than `max_pixels`, and goes on; "raise" stops at them.
        max_pixels: An image with more is not read, against files that would fill the memory.
        seed: Seed of order and augmentation.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        source: str = "digits",
        predict_source: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        augmentation: AugmentationConfig = AugmentationConfig(),
        data_config: dict[str, Any] | None = None,
        on_error: Literal["skip", "raise"] = "skip",
        max_pixels: int = 2**28,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.predict_source = source, predict_source
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.augmentation, self.data_config = augmentation, data_config or {}
        self.on_error, self.max_pixels = on_error, max_pixels
        self.seed, self.num_workers = seed, num_workers
        self._check()
        self.class_names: tuple[str, ...] | None = None
        self._images: dict[Split, ImageFiles] = {}
        self._resolved: dict[str, Any] | None = None

    @property
    def class_counts(self) -> list[int]:
        """Number of training images of each class."""
        assert self.class_names is not None
        labels = self._images["train"].labels
        return np.bincount(labels, minlength=len(self.class_names)).tolist()

    @property
    def has_test(self) -> bool:
        """Whether there are test images."""
        return bool(self._images["test"])

    def setup(self, stage: str, *, model: nn.Module | None = None) -> None:
        """Finds the images, and asks the model how it wants them.

        Args:
            stage: "fit", "validate", "test" or "predict".
            model: The model, where there is no Trainer.
        """
        if model is None:
            model = self.trainer.lightning_module.model
        config = resolve_data_config(self.data_config, model=model)
        if config["input_size"][0] != 3:
            raise ValueError(
                "the images are RGB, got a model or data_config with input_size="
                f"{tuple(config['input_size'])}. Use in_chans=3."
            )
        self._resolved = config
        # A folder to predict from may be all that there is.
        if not self._images and (stage != "predict" or self.predict_source is None):
            self.class_names, self._images = load_images(
                self.source,
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                max_pixels=self.max_pixels,
            )
            sizes = ", ".join(f"{split} {len(own.names):,}" for split, own in self._images.items())
            rank_zero_info(f"images from {self.source!r}: {sizes}")

    def train_dataloader(self) -> TrainLoader:
        """Returns the loader of augmented images."""
        return TrainLoader(
            image_source(self._images["train"], self._transform(is_training=True)),
            batch_size=self.batch_size,
            seed=self.seed,
            repeat=0 if self.trainer is None else self.trainer.overfit_batches,
            **self._loader_options(),
        )

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Returns the loader of validation images; nothing if none are held out."""
        return self._eval_loader(self._images["val"]) if self._images["val"] else []

    def test_dataloader(self) -> EvalLoader:
        """Returns the loader of test images."""
        if not self.has_test:
            raise ValueError(
                f"the test needs images, got source={self.source!r} without a folder 'test' and "
                f"test_fraction={self.test_fraction}. Make the folder, or validate instead."
            )
        return self._eval_loader(self._images["test"])

    def predict_dataloader(self) -> EvalLoader:
        """Returns the loader of the images of `predict_source`, in their order."""
        if self.predict_source is None:
            return self.test_dataloader()
        names = tuple(find_images(self.predict_source))
        images = ImageFiles(
            names=names, labels=(UNLABELLED,) * len(names), max_pixels=self.max_pixels
        )
        return self._eval_loader(images, places=range(len(images)))

    def _eval_loader(self, images: ImageFiles, **options: Any) -> EvalLoader:
        return EvalLoader(
            image_source(images, self._transform(is_training=False)),
            batch_size=self.eval_batch_size or self.batch_size,
            **options,
            **self._loader_options(),
        )

    def _loader_options(self) -> dict[str, Any]:
        return {"on_error": self.on_error, **loader_options(self)}

    def _transform(self, *, is_training: bool) -> Transform:
        assert self._resolved is not None
        if not is_training:
            return create_transform(**self._resolved)
        augmentation = self.augmentation
        return create_transform(
            **self._resolved,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            re_prob=augmentation.erasing,
            re_mode="pixel",
        )

    def _check(self) -> None:
        check_fractions(val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        check_least(
            batch_size=(self.batch_size, 1),
            eval_batch_size=(self.eval_batch_size, 1),
            max_pixels=(self.max_pixels, 1),
            num_workers=(self.num_workers, 0),
            seed=(self.seed, 0),
        )
        check_on_error(self.on_error)
        unknown = sorted(set(self.data_config) - set(_DATA_CONFIG))
        if unknown:
            raise ValueError(
                f"data_config takes {', '.join(_DATA_CONFIG)}, got {', '.join(unknown)}."
            )
        for name, choices in _CHOICES.items():
            value = self.data_config.get(name, choices[0])
            if value not in choices:
                raise ValueError(
                    f"data_config.{name} must be one of {', '.join(choices)}, got {value!r}."
                )
