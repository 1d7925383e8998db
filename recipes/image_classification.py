r"""Trains a vision model to classify images.

    python -m recipes.image_classification fit --config configs/vision/digits_quickstart.yaml
    python -m recipes.image_classification test --config configs/vision/digits_quickstart.yaml
    python -m recipes.image_classification predict --config configs/vision/digits_quickstart.yaml \
        --data.predict_source photos/

Every option: `python -m recipes.image_classification fit --help`.
"""

import dataclasses
from typing import Any, Literal

from timm.data import Mixup
from torch import Tensor

from longnet_zoo.layers import MemorySaving
from recipes.classification import ClassificationTask
from recipes.classifiers import changed_options, check_modality, create_classifier
from recipes.cli import run
from recipes.image_data import ImageDataModule
from recipes.optimization import OptimizationConfig

__all__ = ["ImageClassifier", "MixupConfig", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """How timm's `Mixup` mixes the images of a training batch in pairs.

    Attributes:
        mixup_alpha: Images are blended with a share drawn from Beta(alpha, alpha); 0 for never.
        cutmix_alpha: A rectangle, whose share of the area is drawn likewise, comes from the other
            image; 0 for never.
        prob: Probability that a batch is mixed at all.
        switch_prob: Where both are on, the probability of the rectangle.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError(
                "mixing needs mixup_alpha or cutmix_alpha, got 0 for both. Leave mixup out for "
                "images as they are."
            )
        for name in ("prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")


class ImageClassifier(ClassificationTask):
    """A registered vision model with its training, evaluation and prediction.

    Args:
        model_name: Name in the registry (`longnet-zoo list`).
        num_classes: Number of classes.
        model_options: Options of `longnet_zoo.create_model` for it, such as `img_size`,
            `segment_lengths` or `drop_path`.
        pretrained: Weights to start from: true for the published ones, a tag of them, a file or a
            Hub id, as in `longnet_zoo.create_model`. They are expected without a head; for others
            `model_options.num_classes` says of how many classes. Where a checkpoint is given, they
            are not read.
        mixup: How training images are mixed; null leaves them alone.
        class_weights: Weight of each class in the training loss; "balanced" weighs by the inverse
            of the number of training images; null weighs all alike.
        label_smoothing: Part of each training label that is spread over all classes.
        optimization: Optimizer and learning rate, by optimizer step.
        warmup_epochs: Sets `optimization.warmup_steps` for data of any size.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
    """

    unit = "images"

    def __init__(
        self,
        *,
        model_name: str = "longvit_tiny_patch8_64",
        num_classes: int = 10,
        model_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        mixup: MixupConfig | None = None,
        class_weights: Literal["balanced"] | list[float] | None = None,
        label_smoothing: float = 0.0,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        warmup_epochs: float = 0.0,
        memory_saving: MemorySaving | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            optimization=optimization,
            warmup_epochs=warmup_epochs,
        )
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        check_modality(model_name, "vision", "vision-language", kind="a vision model")
        self.model = create_classifier(
            model_name, num_classes=num_classes, pretrained=pretrained, options=model_options
        )
        self.model.set_memory_saving(memory_saving)
        mixup = MixupConfig(**mixup) if isinstance(mixup, dict) else mixup
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "num_classes": num_classes,
                "model_options": changed_options(self.model, model_name),
                "mixup": None if mixup is None else dataclasses.asdict(mixup),
                "class_weights": class_weights,
                "label_smoothing": label_smoothing,
                "optimization": dataclasses.asdict(self.optimization),
                "warmup_epochs": warmup_epochs,
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )
        self._mixup = None
        if mixup is not None:
            # The loss smooths, which comes to the same.
            self._mixup = Mixup(
                **dataclasses.asdict(mixup), label_smoothing=0.0, num_classes=num_classes
            )

    def setup(self, stage: str) -> None:
        """Compares the data with the model.

        Raises:
            ValueError: Classes differ, or batches cannot be mixed in pairs.
        """
        super().setup(stage)
        batch_size = self.trainer.datamodule.batch_size
        if stage == "fit" and self._mixup is not None and batch_size % 2:
            raise ValueError(
                f"mixup needs an even batch_size, got {batch_size}. Pass another "
                "--data.batch_size, or --model.mixup null."
            )

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Returns the scores of the classes, (b, c)."""
        return self.model(batch["images"])

    def labels(self, batch: dict[str, Any]) -> Tensor:
        """Returns the class of each image, (b,)."""
        return batch["labels"]

    def names(self, batch: dict[str, Any]) -> list[str]:
        """Returns the path of each image."""
        return batch["names"]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Returns the loss of a batch, mixed if asked."""
        if self._mixup is None:
            return super().training_loss(batch)
        images, targets = self._mixup(batch["images"], batch["labels"])
        return self.loss(self.model(images), targets)


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(ImageClassifier, ImageDataModule, args=args)


if __name__ == "__main__":
    main()
