r"""Trains a multimodal model to answer questions about what is seen and heard at one time.

    python -m recipes.multimodal fit --config configs/multimodal/quickstart.yaml
    python -m recipes.multimodal test --config configs/multimodal/quickstart.yaml
    python -m recipes.multimodal predict --config configs/multimodal/quickstart.yaml

`fit` and `test` end with a table of what the model knows from every set of modalities, and with a
picture of held-out scenes, with who attends to whom.

Every option: `python -m recipes.multimodal fit --help`.
"""

import dataclasses
import itertools
from typing import Any, Literal

import torch
from torch import Tensor

from longnet_zoo.layers import MemorySaving
from longnet_zoo.models import AudioModality, FramesModality
from recipes.baselines import report
from recipes.classification import UNLABELLED, ClassificationTask
from recipes.classification_metrics import ClassificationMetrics
from recipes.classifiers import changed_options, check_modality, create_classifier
from recipes.cli import run
from recipes.figures import log_examples
from recipes.multimodal_data import MultimodalDataModule
from recipes.multimodal_figures import SceneExample, scenes_figure
from recipes.multimodal_loader import pixels
from recipes.optimization import OptimizationConfig
from recipes.trainer_batches import held_out

__all__ = ["MultimodalClassifier", "main", "restricted"]

_NUM_EXAMPLES = 3
_Batch = dict[str, Any]


class MultimodalClassifier(ClassificationTask):
    """A registered multimodal model with its training, evaluation and prediction.

    Args:
        model_name: Name in the registry (`longnet-zoo list`).
        num_classes: Number of classes.
        model_options: Options of `longnet_zoo.create_model` for it, such as `modalities`,
            `modality_dropout` or `embed_dim`.
        pretrained: Weights to start from: a file or a Hub id, as in `longnet_zoo.create_model`.
            Where a checkpoint is given, they are not read.
        subsets: Whether to end with the table of all sets of modalities.
        label_smoothing: Part of each training label that is spread over all classes.
        optimization: Optimizer and learning rate, by optimizer step.
        warmup_epochs: Sets `optimization.warmup_steps` for data of any size.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
    """

    unit = "scenes"

    def __init__(
        self,
        *,
        model_name: str = "longnet_multimodal_tiny",
        num_classes: int = 10,
        model_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        subsets: bool = True,
        label_smoothing: float = 0.0,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        warmup_epochs: float = 0.0,
        memory_saving: MemorySaving | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            label_smoothing=label_smoothing,
            optimization=optimization,
            warmup_epochs=warmup_epochs,
        )
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        self.subsets = subsets
        check_modality(model_name, "multimodal", kind="a multimodal model")
        self.model = create_classifier(
            model_name, num_classes=num_classes, pretrained=pretrained, options=model_options
        )
        self.model.set_memory_saving(memory_saving)
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "num_classes": num_classes,
                "model_options": changed_options(self.model, model_name),
                "subsets": subsets,
                "label_smoothing": label_smoothing,
                "optimization": dataclasses.asdict(self.optimization),
                "warmup_epochs": warmup_epochs,
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )

    def logits(self, batch: _Batch) -> Tensor:
        """Returns the scores of the classes, (b, c)."""
        return self.model(
            batch["inputs"],
            times=batch["times"],
            padding_masks=batch["padding_masks"],
            present=batch["present"],
        )

    def labels(self, batch: _Batch) -> Tensor:
        """Returns the class of each scene, (b,)."""
        return batch["labels"]

    def names(self, batch: _Batch) -> list[str]:
        """Returns the name of each scene, with its question."""
        pairs = zip(batch["names"], batch["questions"], strict=True)
        return [f"{name}: {text}" if name and text else name for name, text in pairs]

    def on_fit_end(self) -> None:
        """Reports on the last evaluation: the test of a report, or validation."""
        self._report("test" if "test" in self.figures else "val")

    def on_test_end(self) -> None:
        """Reports on the test."""
        self._report("test")

    def _report(self, split: Literal["val", "test"]) -> None:
        """Reports what is known from each set of modalities, and draws some scenes."""
        if split not in self.figures:
            return
        was_training = self.training
        self.eval()
        if self.subsets:
            results = self._by_subset(split)
            report(self.trainer, results, split=split, num_classes=self.num_classes)
        examples = self._examples(split)
        if examples:
            title = f"Held-out scenes: {self.figures[split]['accuracy']:.1%} of all are right"
            log_examples(self.trainer, split, scenes_figure(examples, title=title))
        self.train(was_training)

    @torch.no_grad()
    def _by_subset(self, split: Literal["val", "test"]) -> dict[str, dict[str, float]]:
        """Evaluates the model on each set of its modalities, the larger ones first."""
        names = self.model.names
        sets = [
            chosen
            for number in range(len(names), 0, -1)
            for chosen in itertools.combinations(names, number)
        ]
        metrics = {
            " + ".join(x): ClassificationMetrics(self.num_classes).to(self.device) for x in sets
        }
        for batch in held_out(self.trainer, split):
            for chosen, metric in zip(sets, metrics.values(), strict=True):
                own = restricted(batch, chosen)
                if own is not None:
                    metric.update(self.logits(own), self.labels(own))
        return {name: metric.compute()[0] for name, metric in metrics.items()}

    @torch.no_grad()
    def _examples(self, split: Literal["val", "test"]) -> list[SceneExample]:
        """Returns scenes that are whole."""
        examples: list[SceneExample] = []
        for batch in held_out(self.trainer, split):
            best = self.logits(batch).float().softmax(-1).max(-1)
            for row, label in enumerate(batch["labels"].tolist()):
                is_whole = all(
                    batch["present"].get(name, [False])[row] for name in self.model.names
                )
                if label == UNLABELLED or not is_whole:
                    continue
                answer = int(best.indices[row]), float(best.values[row])
                examples.append(self._example(batch, row, *answer))
                if len(examples) == _NUM_EXAMPLES:
                    return examples
        return examples

    def _example(self, batch: _Batch, row: int, answer: int, probability: float) -> SceneExample:
        model = self.model
        one = {
            key: {name: x[row : row + 1] for name, x in batch[key].items()}
            for key in ("inputs", "times", "padding_masks")
        }
        weights = model.attention_weights(**one)[-1]
        moment, shown = batch["moment_seconds"][row], {}
        frames, log_mel, seconds = None, None, 0.0
        for modality in model.config.parts:
            name, x = modality.name, one["inputs"][modality.name]
            number = weights[name, name].shape[-1]
            if isinstance(modality, FramesModality):
                frames, seconds = pixels(x[0]), max(seconds, x.shape[1] * moment)
                middles = one["times"][name][0].cpu()
                shown[name] = middles.repeat_interleave(number // x.shape[1])
            elif isinstance(modality, AudioModality):
                seconds = max(seconds, x.shape[1] / modality.sample_rate)
                shown[name] = (torch.arange(number) + 0.5) / modality.frame_rate
                log_mel = model.encoders[name].front_end.log_mel(x)[0].float().cpu()
        return SceneExample(
            frames=frames,
            log_mel=log_mel,
            seconds=seconds,
            moment_seconds=moment,
            families=tuple(batch["families"][row]),
            question=batch["questions"][row],
            true=self.shown_class_names[int(batch["labels"][row])],
            predicted=self.shown_class_names[answer],
            probability=probability,
            weights={pair: x[0].mean(0).cpu() for pair, x in weights.items()},
            times=shown,
        )


def restricted(batch: _Batch, names: tuple[str, ...]) -> _Batch | None:
    """Leaves a batch some of its modalities, and the samples that have one of them.

    Args:
        batch: A batch of scenes.
        names: The modalities that stay.

    Returns:
        The batch; None where no sample has one of them.
    """
    has = {name: flags for name, flags in batch["present"].items() if name in names}
    rows = [row for row, own in enumerate(zip(*has.values(), strict=True)) if any(own)]
    if not rows:
        return None
    take = torch.tensor(rows, device=batch["labels"].device)

    def taken(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x[take] for name, x in values.items() if name in names}

    return {
        **{key: taken(batch[key]) for key in ("inputs", "times", "padding_masks")},
        "present": {name: [flags[row] for row in rows] for name, flags in has.items()},
        "labels": batch["labels"][take],
        "names": [batch["names"][row] for row in rows],
    }


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(MultimodalClassifier, MultimodalDataModule, args=args)


if __name__ == "__main__":
    main()
