"""Writes what an image-text model came to: metrics.json, retrieval.png and a table to read."""

import collections
import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from recipes.callbacks import RunClock, Throughput
from recipes.classification_metrics import UNLABELLED
from recipes.image_text_scores import (
    KS,
    BagOfPixels,
    Gallery,
    chance_scores,
    embed_bag_of_pixels,
    retrieval_scores,
)
from recipes.run_folder import run_lines
from recipes.trainer_batches import held_out

__all__ = ["ImageTextReport", "score_table"]

Scores = dict[str, float]

_DIRECTIONS = {"text_to_image": "sentence -> image", "image_to_text": "image -> sentence"}


class ImageTextReport(RunClock):
    """Tests the model when training ends, and writes a report into the run folder.

    Beside the model's recall it puts that of chance, and of words that a linear map reads off a
    small grey image. Where nothing is held out for the test, it reports the last validation.

    Args:
        title: Heading of the report; None takes the name of the model.
        max_baseline_pairs: Training pairs that the bag of pixels learns from; 0 leaves it out.
    """

    def __init__(self, *, title: str | None = None, max_baseline_pairs: int = 20_000) -> None:
        super().__init__()
        if max_baseline_pairs < 0:
            raise ValueError(f"max_baseline_pairs must be 0 or more, got {max_baseline_pairs}.")
        self._title, self._max_baseline_pairs = title, max_baseline_pairs

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tests on all processes, writes on the first; the last checkpoint is saved by then."""
        if trainer.fast_dev_run:
            return
        data = trainer.datamodule
        if data.has_test:
            _evaluate_test(trainer, pl_module)
        split: Literal["val", "test"] = "test" if "test" in pl_module.galleries else "val"
        if split not in pl_module.galleries:
            if trainer.is_global_zero:
                print("No report: nothing that is held out for validation or test has been read.")
            return
        gallery = pl_module.galleries[split]
        was_training = pl_module.training
        pl_module.eval()
        loader = data.eval_loader(split, is_shared=False)
        pl_module.show(gallery, loader, name="retrieval")
        pl_module.train(was_training)
        if trainer.is_global_zero:
            self._write(trainer, pl_module, split)

    def _write(self, trainer: L.Trainer, task: Any, split: str) -> None:
        folder = Path(trainer.default_root_dir)
        gallery, name = task.galleries[split], task.hparams["model_name"]
        rows = {"chance": chance_scores(gallery.positives)}
        if self._max_baseline_pairs:
            rows["bag of pixels"] = self._baseline_scores(trainer.datamodule, split)
        rows[name] = task.scores[split]
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        metrics: dict[str, Any] = {f"{split}_{key}": value for key, value in rows[name].items()}
        for kind in rows.keys() - {name}:
            prefix = kind.replace(" ", "_")
            metrics |= {f"{prefix}_{key}": value for key, value in rows[kind].items()}
        metrics |= _class_shares(gallery, len(trainer.datamodule.class_names))
        metrics |= {
            f"{split}_pairs": len(gallery),
            "steps": trainer.global_step,
            "train_seconds": round(throughput.train_seconds, 1),
            "total_seconds": round(self.seconds, 1),
        }
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}, indent=2) + "\n")
        print(_summary(trainer, split, metrics, rows, self._title or name))

    def _baseline_scores(self, data: Any, split: Any) -> Scores:
        training = data.eval_loader("train", limit=self._max_baseline_pairs, is_shared=False)
        gallery = embed_bag_of_pixels(
            BagOfPixels(training), data.eval_loader(split, is_shared=False)
        )
        return retrieval_scores(gallery.similarity, gallery.positives)


def _evaluate_test(trainer: L.Trainer, task: Any) -> None:
    """Tests a model in the midst of a fit; all processes must call this."""
    was_training = task.training
    task.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        batches = held_out(trainer, "test", counts_skipped=True)
        parts = [task.embed(batch) for batch in batches]
        # A limit may leave none.
        gallery = task.collect(parts) if parts else ()
        if len(gallery):
            task.galleries["test"], task.scores["test"] = gallery, task.score(gallery)
    task.train(was_training)


def _class_shares(gallery: Gallery, num_classes: int) -> Scores:
    """Returns what zero-shot classification compares with: chance, and the commonest class."""
    labels = gallery.labels[gallery.labels != UNLABELLED].tolist()
    if not labels:
        return {}
    most = collections.Counter(labels).most_common(1)[0][1]
    return {
        "zero_shot_chance": 1 / num_classes,
        "zero_shot_commonest_class": most / len(labels),
        "zero_shot_pairs": len(labels),
    }


def score_table(rows: dict[str, Scores]) -> str:
    """Returns recalls as a table to print.

    Args:
        rows: For each method its recalls, as `retrieval_scores` names them.
    """
    width = max(map(len, rows))
    head = "  ".join(f"{title:^{8 * len(KS)}}" for title in _DIRECTIONS.values())
    ks = "  ".join("".join(f"{f'@{k}':>8}" for k in KS) for _ in _DIRECTIONS)
    lines = [f"{'':<{width}}  {head}".rstrip(), f"{'recall':<{width}}  {ks}"]
    for name, scores in rows.items():
        cells = "  ".join(
            "".join(f"{scores[f'{direction}_recall@{k}']:>8.1%}" for k in KS)
            for direction in _DIRECTIONS
        )
        lines.append(f"{name:<{width}}  {cells}")
    return "\n".join(lines)


def _summary(
    trainer: L.Trainer, split: str, metrics: dict[str, Any], rows: dict[str, Scores], title: str
) -> str:
    rule = "-" * 78
    name = {"val": "validation", "test": "test"}[split]
    found, chance = metrics[f"{split}_recall@5"], metrics["chance_recall@5"]
    lines = [
        rule,
        f"{title}: {metrics[f'{split}_pairs']:,} {name} pairs",
        "",
        score_table(rows),
        "",
        f"Recall@5 is {found:.1%}, {found / chance:.0f} times chance.",
    ]
    if f"{split}_zero_shot_accuracy" in metrics:
        lines.append(
            f"Zero-shot    {metrics[f'{split}_zero_shot_accuracy']:.1%} of "
            f"{metrics['zero_shot_pairs']:,} images are put into the right class by its name; "
            f"chance {metrics['zero_shot_chance']:.1%}, "
            f"commonest class {metrics['zero_shot_commonest_class']:.1%}"
        )
    files = run_lines(trainer, metrics, ["retrieval.png", "pattern.png"])
    return "\n".join([*lines, *files, rule])
