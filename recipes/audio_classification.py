r"""Trains an audio model to classify recordings.

    python -m recipes.audio_classification fit --config configs/audio/quickstart.yaml
    python -m recipes.audio_classification test --config configs/audio/quickstart.yaml
    python -m recipes.audio_classification predict --config configs/audio/quickstart.yaml \
        --data.predict_source recordings/

`fit` and `test` end with a table: this run, and beside it simple classifiers of the same recordings
(`audio_baselines`); and with a picture of held-out recordings.

Every option: `python -m recipes.audio_classification fit --help`.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longnet_zoo.layers import MemorySaving
from recipes.audio_baselines import compare_clips
from recipes.audio_data import AudioDataModule
from recipes.audio_figures import ClipExample, clips_figure
from recipes.baselines import BaselineConfig, report
from recipes.classification import UNLABELLED, ClassificationTask
from recipes.classifiers import changed_options, check_modality, create_classifier
from recipes.cli import run
from recipes.figures import log_examples
from recipes.optimization import OptimizationConfig
from recipes.trainer_batches import held_out

__all__ = ["AudioClassifier", "main"]

_NUM_EXAMPLES = 16


class AudioClassifier(ClassificationTask):
    """A registered audio model with its training, evaluation and prediction.

    Args:
        model_name: Name in the registry (`longnet-zoo list`).
        num_classes: Number of classes.
        model_options: Options of `longnet_zoo.create_model` for it, such as `embed_dim`,
            `segment_lengths` or `drop_path`.
        pretrained: Weights to start from: a file or a Hub id, as in `longnet_zoo.create_model`.
            They are expected without a head; for others `model_options.num_classes` says of how
            many classes. Where a checkpoint is given, they are not read.
        mixup_alpha: Training recordings are mixed in pairs with shares drawn from Beta(alpha,
            alpha), and so are their classes (arXiv 1710.09412); 0 leaves them alone.
        baselines: How to fit what is reported beside the run; null leaves it out.
        class_weights: Weight of each class in the training loss; "balanced" weighs by the inverse
            of the number of training recordings; null weighs all alike.
        label_smoothing: Part of each training label that is spread over all classes.
        optimization: Optimizer and learning rate, by optimizer step.
        warmup_epochs: Sets `optimization.warmup_steps` for data of any size.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
    """

    unit = "recordings"

    def __init__(
        self,
        *,
        model_name: str = "longnet_audio_tiny",
        num_classes: int = 8,
        model_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        mixup_alpha: float = 0.0,
        baselines: BaselineConfig | None = BaselineConfig(),  # noqa: B008 - frozen
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
        if mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must be 0 or more, got {mixup_alpha}.")
        self.mixup_alpha = mixup_alpha
        self.baselines = BaselineConfig(**baselines) if isinstance(baselines, dict) else baselines
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        check_modality(model_name, "audio", kind="an audio model")
        options = {**(model_options or {}), "head": "clip"}
        self.model = create_classifier(
            model_name, num_classes=num_classes, pretrained=pretrained, options=options
        )
        self.model.set_memory_saving(memory_saving)
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "num_classes": num_classes,
                "model_options": changed_options(self.model, model_name),
                "mixup_alpha": mixup_alpha,
                "baselines": self.baselines and dataclasses.asdict(self.baselines),
                "class_weights": class_weights,
                "label_smoothing": label_smoothing,
                "optimization": dataclasses.asdict(self.optimization),
                "warmup_epochs": warmup_epochs,
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )

    def setup(self, stage: str) -> None:
        """Refuses classes that are not the model's, and recordings without label."""
        super().setup(stage)
        data = self.trainer.datamodule
        if isinstance(data, AudioDataModule):
            data.require("label")

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Returns the scores of the classes, (b, c)."""
        return self.model(batch["waveform"], batch["lengths"])

    def labels(self, batch: dict[str, Any]) -> Tensor:
        """Returns the class of each recording, (b,)."""
        return batch["labels"]

    def names(self, batch: dict[str, Any]) -> list[str]:
        """Returns the path of each recording."""
        return batch["names"]

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Returns the loss of a batch, mixed if asked."""
        if not self.mixup_alpha:
            return super().training_loss(batch)
        share = float(np.random.beta(self.mixup_alpha, self.mixup_alpha))
        waveform, lengths = batch["waveform"], batch["lengths"]
        mixed = share * waveform + (1 - share) * waveform.flip(0)
        logits = self.model(mixed, torch.maximum(lengths, lengths.flip(0)))
        labels = batch["labels"]
        return share * self.loss(logits, labels) + (1 - share) * self.loss(logits, labels.flip(0))

    def on_fit_end(self) -> None:
        """Reports on the last evaluation: the test of a report, or validation."""
        self._report("test" if "test" in self.figures else "val")

    def on_test_end(self) -> None:
        """Reports on the test."""
        self._report("test")

    def _report(self, split: Literal["val", "test"]) -> None:
        """Reports the baselines beside an evaluation, and draws some of its recordings."""
        if split not in self.figures:
            return
        trainer = self.trainer
        if self.baselines is not None:
            results = compare_clips(
                trainer,
                self.model,
                train=trainer.datamodule.plain_train_dataloader(self.baselines.max_samples),
                held_out=held_out(trainer, split),
                num_classes=self.num_classes,
                config=self.baselines,
            )
            results = {"this run": self.figures[split], **results}
            report(trainer, results, split=split, num_classes=self.num_classes)
        examples = self._examples(split)
        if examples:
            title = f"Held-out recordings: {self.figures[split]['accuracy']:.1%} of all are right"
            log_examples(trainer, split, clips_figure(examples, title=title))

    @torch.no_grad()
    def _examples(self, split: Literal["val", "test"]) -> list[ClipExample]:
        """Returns recordings of all classes in turn."""
        by_class: dict[int, list[ClipExample]] = {}
        for batch in held_out(self.trainer, split):
            waveform, lengths = batch["waveform"], batch["lengths"]
            best = self.model(waveform, lengths).float().softmax(-1).max(-1)
            pictures = self.model.log_mel(waveform, lengths).float().cpu()
            columns = lengths * pictures.shape[1] // waveform.shape[1]
            for i, label in enumerate(batch["labels"].tolist()):
                if label == UNLABELLED:
                    continue
                example = ClipExample(
                    log_mel=pictures[i, : int(columns[i])],
                    seconds=int(lengths[i]) / self.model.config.sample_rate,
                    name=batch["names"][i],
                    true=self.shown_class_names[label],
                    predicted=self.shown_class_names[int(best.indices[i])],
                    probability=float(best.values[i]),
                )
                by_class.setdefault(label, []).append(example)
            if sum(map(len, by_class.values())) >= 8 * _NUM_EXAMPLES:
                break
        turns = [(turn, label) for label, own in by_class.items() for turn in range(len(own))]
        return [by_class[label][turn] for turn, label in sorted(turns)[:_NUM_EXAMPLES]]


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(AudioClassifier, AudioDataModule, args=args)


if __name__ == "__main__":
    main()
