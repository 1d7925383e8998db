r"""Trains an audio model to say what is heard when: a tag of each class for every frame.

    python -m recipes.audio_tagging fit --config configs/audio/soundscapes.yaml
    python -m recipes.audio_tagging test --config configs/audio/soundscapes.yaml
    python -m recipes.audio_tagging predict --config configs/audio/soundscapes.yaml \
        --data.predict_source recordings/

`fit` and `test` end with a table: this run, and beside it simple taggers of the same frames
(`audio_baselines`); and with a picture of a held-out recording.

Every option: `python -m recipes.audio_tagging fit --help`.
"""

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_zoo.layers import MemorySaving
from recipes.audio_baselines import compare_frames
from recipes.audio_data import AudioDataModule
from recipes.audio_events import events_of, frame_tags
from recipes.audio_figures import TagExample, tags_figure
from recipes.baselines import BaselineConfig
from recipes.classification import UNLABELLED, ClassificationTask
from recipes.classifiers import changed_options, check_modality, create_classifier
from recipes.cli import run
from recipes.figures import log_examples, log_figure, pattern_figure
from recipes.optimization import OptimizationConfig
from recipes.run_folder import update_record
from recipes.tagging_metrics import TaggingMetrics, tag_scores
from recipes.trainer_batches import held_out

__all__ = ["AudioTagger", "main"]

# What a picture can show.
_MAX_SECONDS = 30.0
_COLUMNS = ("f1", "map")


class AudioTagger(ClassificationTask):
    """A registered audio model with its training, evaluation and prediction.

    Args:
        model_name: Name in the registry (`longnet-zoo list`).
        num_classes: Number of classes.
        model_options: Options of `longnet_zoo.create_model` for it, such as `embed_dim`,
            `segment_lengths` or `drop_path`.
        pretrained: Weights to start from: a file or a Hub id, as in `longnet_zoo.create_model`.
            They are expected without a head; for others `model_options.num_classes` says of how
            many classes. Where a checkpoint is given, they are not read.
        threshold: Probability from which on `predict` says that a class is heard.
        baselines: How to fit what is reported beside the run; null leaves it out.
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
        threshold: float = 0.5,
        baselines: BaselineConfig | None = BaselineConfig(),  # noqa: B008 - frozen
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        warmup_epochs: float = 0.0,
        memory_saving: MemorySaving | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes, optimization=optimization, warmup_epochs=warmup_epochs
        )
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}.")
        self.threshold = threshold
        self.baselines = BaselineConfig(**baselines) if isinstance(baselines, dict) else baselines
        self.metrics = TaggingMetrics(num_classes)
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        check_modality(model_name, "audio", kind="an audio model")
        options = {**(model_options or {}), "head": "frames"}
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
                "threshold": threshold,
                "baselines": self.baselines and dataclasses.asdict(self.baselines),
                "optimization": dataclasses.asdict(self.optimization),
                "warmup_epochs": warmup_epochs,
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )

    def setup(self, stage: str) -> None:
        """Refuses classes that are not the model's, and recordings without events."""
        super().setup(stage)
        data = self.trainer.datamodule
        if isinstance(data, AudioDataModule):
            data.require("events")

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Returns the log-odds of each class in each frame, (b, frames, c)."""
        return self.model(batch["waveform"], batch["lengths"])

    def labels(self, batch: dict[str, Any]) -> Tensor:
        """Returns what is heard in each frame, (b, frames, c); `UNLABELLED` behind the end."""
        lengths, num_samples = batch["lengths"], batch["waveform"].shape[1]
        num_real = torch.tensor(
            [self.model.num_frames(length) for length in lengths.tolist()], device=lengths.device
        )
        return frame_tags(
            batch["events"],
            num_real,
            num_frames=self.model.num_frames(num_samples),
            frame_rate=self.model.frame_rate,
            num_classes=self.num_classes,
        )

    def names(self, batch: dict[str, Any]) -> list[str]:
        """Returns the path of each recording."""
        return batch["names"]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean binary cross-entropy of the frames that have tags.

        Args:
            logits: Log-odds, (b, frames, c).
            targets: Tags, (b, frames, c).
        """
        known = (targets != UNLABELLED).float()
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), targets.clamp(min=0).float(), weight=known, reduction="sum"
        )
        return losses / known.sum().clamp(min=1)

    def predict_step(self, batch: Any, batch_idx: int) -> list[tuple[str, str, float, float]]:
        """Prints name, class, start and end of each event, and returns them."""
        rows = []
        probabilities = self.logits(batch).float().sigmoid()
        ends = [self.model.num_frames(length) for length in batch["lengths"].tolist()]
        for name, own, end in zip(self.names(batch), probabilities, ends, strict=True):
            found = events_of(own[:end], frame_rate=self.model.frame_rate, threshold=self.threshold)
            # Without a name it is none of the data.
            for number, start, stop, best in found if name else ():
                label = self.shown_class_names[number]
                print(f"{name}\t{label}\t{start:.2f}\t{stop:.2f}\t{best:.3f}")
                rows.append((name, label, start, stop))
        return rows

    def progress_text(self, metrics: dict[str, float]) -> str:
        """Returns what a progress bar shows of the newest metrics."""
        parts = [super().progress_text(metrics)]
        if "val_f1" in metrics:
            parts.append(f"val F1 {metrics['val_f1']:.1%}")
        return "  ".join(part for part in parts if part)

    def on_fit_end(self) -> None:
        """Reports on the last evaluation: the test of a report, or validation."""
        self._report("test" if "test" in self.figures else "val")

    def on_test_end(self) -> None:
        """Reports on the test."""
        self._report("test")

    def log_held_out(self, split: Literal["val", "test"]) -> None:
        """Logs the figures; a confusion matrix has no meaning where classes sound together."""
        figures, scores = self.metrics.compute()
        if self.trainer.sanity_checking or not figures:
            return
        self.figures[split], self.confusions[split] = figures, scores
        for name, value in figures.items():
            self.log(f"{split}_{name}", value, sync_dist=True)
        if self.trainer.is_global_zero and not self._has_logged_pattern:
            self._has_logged_pattern = True
            log_figure(self.trainer, "pattern", pattern_figure(self.model.config))

    def _report(self, split: Literal["val", "test"]) -> None:
        """Reports classes and baselines beside an evaluation, and draws a recording."""
        if split not in self.figures:
            return
        results = {"this run": self.figures[split]}
        if self.baselines is not None:
            results |= compare_frames(
                self.trainer,
                self.model,
                self.labels,
                train=self.trainer.datamodule.plain_train_dataloader(self.baselines.max_samples),
                held_out=held_out(self.trainer, split),
                num_classes=self.num_classes,
                config=self.baselines,
            )
        example = self._example(split)
        if not self.trainer.is_global_zero:
            return
        rows = tag_scores(self.confusions[split], self.shown_class_names)
        print(_table(split, results, rows))
        if self.trainer.fast_dev_run:
            return
        if example is not None:
            log_examples(self.trainer, split, tags_figure(example))
        metrics = {f"{split}_{name}": value for name, value in self.figures[split].items()}
        update_record(
            self.trainer.default_root_dir,
            metrics=metrics,
            comparison={split: results},
            **{f"{split}_classes": rows},
        )

    @torch.no_grad()
    def _example(self, split: Literal["val", "test"]) -> TagExample | None:
        """Returns the front of the first recording with tags."""
        for batch in held_out(self.trainer, split):
            for place, events in enumerate(batch["events"]):
                if events is None:
                    continue
                length = int(batch["lengths"][place])
                waveform = batch["waveform"][place : place + 1, :length]
                probabilities = self.model(waveform)[0].float().sigmoid().cpu()
                seconds = length / self.model.config.sample_rate
                shown = min(_MAX_SECONDS, seconds)
                share = shown / seconds
                pictures = self.model.log_mel(waveform)[0].float().cpu()
                return TagExample(
                    log_mel=pictures[: round(len(pictures) * share)],
                    seconds=shown,
                    name=batch["names"][place],
                    class_names=self.shown_class_names,
                    events=[tuple(row) for row in events.tolist()],
                    probabilities=probabilities[: round(len(probabilities) * share)],
                    threshold=self.threshold,
                )
        return None


def _table(
    split: str, results: dict[str, dict[str, float]], rows: dict[str, dict[str, float | None]]
) -> str:
    """Returns the table of classes and the one of this run and the baselines."""
    width = max(map(len, (*rows, *results)))
    cell = lambda value: "-".rjust(6) if value is None else f"{value:6.3f}"  # noqa: E731
    lines = ["", f"{split:{width}}  frames      f1     ap"]
    for name, row in rows.items():
        lines.append(f"{name:{width}}  {row['frames']:6.0f}  {cell(row['f1'])} {cell(row['ap'])}")
    lines += ["", f"{split:{width}}      f1    map"]
    for name, figures in results.items():
        cells = " ".join(cell(figures.get(column)) for column in _COLUMNS)
        lines.append(f"{name:{width}}  {cells}")
    return "\n".join([*lines, ""])


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(AudioTagger, AudioDataModule, args=args)


if __name__ == "__main__":
    main()
