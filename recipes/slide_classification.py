r"""Trains a slide encoder to classify slides from the embeddings of their tiles.

    python -m recipes.slide_classification fit --config configs/slides/quickstart.yaml
    python -m recipes.slide_classification test --config configs/slides/quickstart.yaml
    python -m recipes.slide_classification predict --config configs/slides/quickstart.yaml \
        --data.predict_source embeddings/

`fit` and `test` end with a table: this run, and beside it what leaves the encoder as it is
(`slide_baselines`).

Every option: `python -m recipes.slide_classification fit --help`.
"""

import copy
import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

import longnet_zoo as lz
from longnet_zoo.layers import MemorySaving
from recipes.baselines import BaselineConfig, report
from recipes.classification import ClassificationTask
from recipes.classifiers import changed_options, check_modality
from recipes.cli import run
from recipes.optimization import OptimizationConfig
from recipes.slide_baselines import Embed, compare, mean_of_tiles
from recipes.slide_data import SlideDataModule
from recipes.slide_network import SlideNetwork
from recipes.trainer_batches import held_out

__all__ = ["SlideClassifier", "main"]


class SlideClassifier(ClassificationTask):
    """A registered slide encoder with its training, evaluation and prediction.

    Args:
        model_name: Name in the registry (`longnet-zoo list`).
        num_classes: Number of classes.
        model_options: Options of `longnet_zoo.create_model` for the encoder, such as `input_dim`,
            `tile_size`, `slide_size`, `pool` or `dropout`.
        pretrained: Weights to start from: true for the published ones, a tag of them, a file or a
            Hub id, as in `longnet_zoo.create_model`. Where a checkpoint is given, they are neither
            read nor compared with.
        freeze_encoder: Whether to train the classifier only.
        layers: Blocks after which the slide is embedded; several are concatenated. These states
            come BEFORE the encoder's last LayerNorm, and published fine-tuning takes [11]; null
            takes the encoder's own embedding, after that LayerNorm.
        baselines: How to fit what is reported beside the run; null leaves it out.
        class_weights: Weight of each class in the training loss; "balanced" weighs by the inverse
            of the number of training slides; null weighs all alike.
        label_smoothing: Part of each training label that is spread over all classes.
        optimization: Optimizer and learning rate, by optimizer step.
        warmup_epochs: Sets `optimization.warmup_steps` for data of any size.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
    """

    unit = "slides"

    def __init__(
        self,
        *,
        model_name: str = "gigapath_slide_enc12l768d",
        num_classes: int = 2,
        model_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        freeze_encoder: bool = False,
        layers: list[int] | None = None,
        baselines: BaselineConfig | None = BaselineConfig(l2=1e-3),  # noqa: B008 - frozen
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
        self.baselines = BaselineConfig(**baselines) if isinstance(baselines, dict) else baselines
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        check_modality(model_name, "slide", kind="a slide encoder")
        encoder = lz.create_model(model_name, pretrained=pretrained, **(model_options or {}))
        self.model = SlideNetwork(
            encoder, num_classes=num_classes, layers=layers, freeze_encoder=freeze_encoder
        )
        encoder.set_memory_saving(memory_saving)
        # The weights that training began with; no part of the checkpoint.
        self._given: list[SlideNetwork] = []
        if pretrained is not False and self.baselines is not None:
            self._given.append(self.model if freeze_encoder else copy.deepcopy(self.model))
        # Plain values only, so that checkpoints load with weights_only=True; and the options that
        # came with given weights, so that they load without the file of these.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "num_classes": num_classes,
                "model_options": changed_options(encoder, model_name),
                "freeze_encoder": freeze_encoder,
                "layers": layers,
                "baselines": self.baselines and dataclasses.asdict(self.baselines),
                "class_weights": class_weights,
                "label_smoothing": label_smoothing,
                "optimization": dataclasses.asdict(self.optimization),
                "warmup_epochs": warmup_epochs,
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )

    def setup(self, stage: str) -> None:
        """Compares the classes and the tile embeddings of the data with the model."""
        # The baselines of a test weigh the classes as those of a training do.
        super().setup("fit" if stage == "test" else stage)
        got, dim = getattr(self.trainer.datamodule, "input_dim", None), self.model.config.input_dim
        if got not in (None, dim):
            raise ValueError(
                "the encoder must read the tile embeddings of the data, got input_dim="
                f"{dim} and embeddings of {got} channels. Set model.model_options.input_dim to "
                f"{got}, or embed the tiles with the encoder that the weights were made for."
            )

    def logits(self, batch: Any) -> Tensor:
        """Returns the scores of the classes, (batch, classes)."""
        return self.model(batch["tiles"], batch["coords"], batch["padding_mask"])

    def labels(self, batch: Any) -> Tensor:
        """Returns the class of each slide, (batch,)."""
        return batch["labels"]

    def names(self, batch: Any) -> list[str]:
        """Returns the slide ids."""
        return batch["names"]

    def on_fit_end(self) -> None:
        """Reports the baselines beside the last evaluation: the test of a report, or validation."""
        self._compare("test" if "test" in self.figures else "val")

    def on_test_end(self) -> None:
        """Reports the baselines beside the test."""
        self._compare("test")

    def _compare(self, split: Literal["val", "test"]) -> None:
        if self.baselines is None or split not in self.figures:
            return
        trainer, data = self.trainer, self.trainer.datamodule
        max_slides = data.batch_size if trainer.fast_dev_run else self.baselines.max_samples
        results = compare(
            trainer,
            self._embedders(),
            train=data.sample_dataloader(max_slides),
            held_out=held_out(trainer, split),
            num_classes=self.num_classes,
            config=self.baselines,
            class_weights=self.loss_weights,
        )
        results = {"this run": self.figures[split], **results}
        report(trainer, results, split=split, num_classes=self.num_classes)

    def _embedders(self) -> dict[str, Embed]:
        """Returns the frozen embeddings to compare with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = lz.create_model(self.hparams["model_name"], **self.hparams["model_options"])
        random = SlideNetwork(encoder, num_classes=self.num_classes, layers=self.model.layers)
        frozen = {"random encoder": random}
        if self._given:
            frozen["pretrained encoder"] = self._given[0]
        embedders: dict[str, Embed] = {
            name: network.to(self.device).eval().embed for name, network in frozen.items()
        }
        return {**embedders, "mean of the tiles": mean_of_tiles}


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(SlideClassifier, SlideDataModule, args=args)


if __name__ == "__main__":
    main()
