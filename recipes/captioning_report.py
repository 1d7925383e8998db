"""Shows what a model writes under images: captions.png, metrics.json and a table to read."""

import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor

from recipes.callbacks import RunClock, Throughput
from recipes.captioning_scores import CaptionScores, TextOnlyModel
from recipes.figures import log_figure
from recipes.run_folder import run_lines
from recipes.trainer_batches import held_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CaptionReport", "captions_figure"]

_INK, _QUIET, _RIGHT = "#1f2933", "#7b8794", "#2f7d4f"
_COLUMNS = 6
_LETTERS_PER_INCH, _TITLE_LETTERS_PER_INCH = 11, 9


class CaptionReport(RunClock):
    """Tests the model when training ends, and writes a report into the run folder.

    Beside the figures of the model stands what text alone would do: a model that counts the tokens
    of training captions, and always the same answer for words of a group. Where nothing is held
    out for the test, the report is about the validation pairs.

    Args:
        title: Heading of the picture; None takes the name of the model.
        num_shown: Images in the picture.
        num_counted: Training captions that the model of text alone learns from; 0 for none.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self, *, title: str | None = None, num_shown: int = 24, num_counted: int = 10_000
    ) -> None:
        super().__init__()
        if num_shown < 1 or num_counted < 0:
            raise ValueError(
                "num_shown must be 1 or more and num_counted 0 or more, got "
                f"num_shown={num_shown} and num_counted={num_counted}."
            )
        self._title, self._num_shown, self._num_counted = title, num_shown, num_counted

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tests on all processes, writes on the first; the last checkpoint is saved by then."""
        if trainer.fast_dev_run:
            return
        split: Literal["val", "test"] = "test" if trainer.datamodule.has_test else "val"
        scores, shown, texts = self._evaluate(trainer, pl_module, split)
        if not trainer.is_global_zero:
            return
        if scores.figures():
            text_only = self._text_only(trainer, pl_module, texts)
            self._write(trainer, split, scores, text_only, shown)
        else:
            print("No report: nothing that is held out for validation or test has been read.")

    def _evaluate(
        self, trainer: L.Trainer, task: Any, split: Literal["val", "test"]
    ) -> tuple[CaptionScores, list[tuple[Tensor, str, str]], list[list[int]]]:
        """Returns figures, images with true and written captions, and the tokens of this process.

        Each text begins with the token that ends it.
        """
        scores, shown, texts = task.new_scores(), [], []
        was_training = task.training
        task.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            # Validation has been counted.
            for batch in held_out(trainer, split, counts_skipped=split == "test"):
                task.score(batch, scores)
                pairs = task.score_texts(batch, scores)
                texts += _texts(task, batch)
                is_read = torch.tensor([bool(name) for name in batch["names"]])
                if len(shown) < self._num_shown:
                    pixels = trainer.datamodule.pixels(batch["images"])[is_read]
                    shown += [(image, *pair) for image, pair in zip(pixels, pairs, strict=True)]
        task.train(was_training)
        scores.reduce(trainer.strategy)
        return scores, shown[: self._num_shown], texts

    def _text_only(
        self, trainer: L.Trainer, task: Any, texts: Sequence[Sequence[int]]
    ) -> float | None:
        """Returns the bits per byte of texts where no image is seen."""
        if not self._num_counted:
            return None
        model = TextOnlyModel(vocab_size=task.model.config.vocab_size)
        model.learn(_training_texts(trainer, task, self._num_counted))
        token_bytes = task.tokenizer.token_bytes
        num_bytes = sum(int(token_bytes[list(text)].sum()) for text in texts)
        return sum(map(model.nats, texts)) / math.log(2) / max(1, num_bytes)

    def _write(
        self,
        trainer: L.Trainer,
        split: str,
        scores: CaptionScores,
        text_only: float | None,
        shown: Sequence[tuple[Tensor, str, str]],
    ) -> None:
        folder = Path(trainer.default_root_dir)
        title = self._title or trainer.lightning_module.hparams["model_name"]
        log_figure(trainer, "captions", captions_figure(shown, title=title))
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        baselines = {f"{name}_accuracy": x for name, x in scores.most_common().items()}
        if text_only is not None:
            baselines["bits_per_byte"] = text_only
        record = {
            "metrics": {
                **{f"{split}_{name}": value for name, value in scores.figures().items()},
                **{f"{split}_{name}_without_image": value for name, value in baselines.items()},
                "steps": trainer.global_step,
                "train_seconds": round(throughput.train_seconds, 1),
                "total_seconds": round(self.seconds, 1),
            },
            f"{split}_captions": [{"true": true, "written": text} for _, true, text in shown],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        print(_summary(trainer, scores.figures(), baselines, record["metrics"]))


def captions_figure(shown: Sequence[tuple[Tensor, str, str]], *, title: str) -> "Figure":
    """Draws images with their true captions, and below what the model wrote.

    Args:
        shown: Image (h, w, 3) in [0, 1], true and written caption of each.
        title: Heading.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.
    """
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    side = 2.0
    width = int(side * _LETTERS_PER_INCH)
    figure = Figure(figsize=(columns * side, rows * (side + 0.7) + 0.6), layout="constrained")
    heading = f"{title}: images that were held out, their captions, and what the model wrote"
    figure.suptitle(
        textwrap.fill(heading, int(columns * side * _TITLE_LETTERS_PER_INCH)),
        **{"x": 0.01, "ha": "left", "fontsize": 12, "fontweight": "bold", "color": _INK},
    )
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in all_axes:
        axes.set_axis_off()
    for axes, (image, true, written) in zip(all_axes, shown, strict=False):
        axes.imshow(image.numpy(), interpolation="nearest")
        colour = _RIGHT if true == written else _INK
        style = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 7.5}
        style |= {"parse_math": False}
        above = _wrapped(true, width, lines=2)
        axes.set_title(above, fontsize=7.5, color=_QUIET, parse_math=False)
        below = _wrapped(written or "(nothing)", width, lines=3)
        axes.text(0.5, -0.02, below, color=colour, **style)
    return figure


def _wrapped(text: str, letters: int, *, lines: int) -> str:
    """Breaks words, too: some writing has no spaces."""
    return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder=" …"))


def _texts(task: Any, batch: dict[str, Any]) -> list[list[int]]:
    """Returns the tokens of each pair of a batch that was read."""
    tokens, is_padding = task.texts(batch)
    rows = zip(tokens.tolist(), (~is_padding).sum(1).tolist(), strict=True)
    return [row[:length] for row, length in rows if length > 1]


def _training_texts(trainer: L.Trainer, task: Any, number: int) -> Iterator[list[int]]:
    """Returns the tokens of so many training pairs, at most an epoch."""
    for batch in trainer.datamodule.train_dataloader():
        texts = _texts(task, batch)
        yield from texts[:number]
        number -= len(texts)
        if number <= 0:
            break


def _summary(
    trainer: L.Trainer,
    figures: dict[str, float],
    baselines: dict[str, float],
    metrics: dict[str, Any],
) -> str:
    rule = "-" * 78
    lines = [f"{'on held-out images':<20} {'model':>9} {'without image':>15}"]
    for name, value in figures.items():
        is_share = not name.startswith(("loss", "bits"))
        known, other = (
            "-" if x is None else f"{x:.1%}" if is_share else f"{x:.3f}"
            for x in (value, baselines.get(name))
        )
        lines.append(f"{name.replace('_', ' '):<20} {known:>9} {other:>15}")
    return "\n".join(
        [
            rule,
            *lines,
            "",
            "Without image: bits per byte of counted training captions, and always the likeliest "
            "word.",
            *run_lines(trainer, metrics, ["captions.png"]),
            rule,
        ]
    )
