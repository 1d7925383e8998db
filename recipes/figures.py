"""Pictures that a run shows: the confusion matrix, the attention pattern, the curves."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from longnet_zoo.plot import DOTS_PER_INCH, plot_pattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "confusion_figure",
    "curves_figure",
    "log_examples",
    "log_figure",
    "pattern_figure",
    "shortened",
]

_INK, _QUIET, _GRID, _LINE = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
_BLUE, _PALE_BLUE, _ORANGE = "#2563a8", "#b9cfe6", "#d9730d"
# More cells than this are coloured but not written into.
_MAX_WRITTEN = 24
# Inches of a cell, and most of the matrix.
_CELL, _MAX_SIDE = 0.62, 12.0
_MAX_NAME = 24  # letters
_TITLE_LETTERS_PER_INCH = 9.5
_MAX_HEADS = 8


def confusion_figure(
    counts: Tensor, class_names: Sequence[str], *, title: str = "Confusion matrix"
) -> "Figure":
    """Draws how often each class was taken for each other one.

    The colour of a cell is its share of the row, that is of the true class. A cell holds its count
    and that share. Long names are cut in their midst.

    Args:
        counts: Number of samples, (classes, classes); rows are the true classes.
        class_names: Name of each class.
        title: The title.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.

    Raises:
        ValueError: There are not as many names as rows and columns.
    """
    from matplotlib.figure import Figure

    number = len(class_names)
    if tuple(counts.shape) != (number, number):
        raise ValueError(
            "counts must have a row and a column for each class, got shape "
            f"{tuple(counts.shape)} and {number} class_names."
        )
    counts = counts.double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(_CELL * number, 2.4), _MAX_SIDE)
    # Room for labels and the colour bar.
    breadth = 1.1 * side + 3.2
    figure = Figure(figsize=(breadth, side + 2.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    font_size = min(10.0, 72 * side / number * 0.7)
    names = [shortened(name) for name in class_names]
    is_wide = max(map(len, names)) > 5
    # A label that is turned ends at its cell.
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_wide else {}
    axes.set_xticks(range(number), names, fontsize=font_size, **turned)
    axes.set_yticks(range(number), names, fontsize=font_size)
    axes.set_xlabel("predicted", color=_QUIET)
    axes.set_ylabel("true", color=_QUIET)
    correct, total = int(counts.diagonal().sum()), int(counts.sum())
    accuracy = f", {correct / total:.1%} right" if total else ""
    # Of the figure and not of the matrix, which may be narrow.
    figure.suptitle(
        textwrap.fill(
            f"{title}: {total:,} samples{accuracy}", int(breadth * _TITLE_LETTERS_PER_INCH)
        ),
        **{"x": 0.02, "ha": "left", "fontsize": 11, "fontweight": "bold", "color": _INK},
    )
    axes.set_xticks([place - 0.5 for place in range(1, number)], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, number)], minor=True)
    axes.grid(which="minor", color=_LINE, linewidth=1.2 if number <= _MAX_WRITTEN else 0.4)
    axes.tick_params(which="both", length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.ax.tick_params(length=0, colors=_QUIET)
    bar.set_label("share of the true class", color=_QUIET)
    bar.outline.set_visible(False)
    if number <= _MAX_WRITTEN:
        _write_cells(axes, counts, shares, cell=side / number)
    return figure


def shortened(name: str, letters: int = _MAX_NAME) -> str:
    """Cuts the middle out of a name of more letters, as names that begin alike are common."""
    if len(name) <= letters:
        return name
    end = (letters - 1) // 2
    return f"{name[: letters - 1 - end]}…{name[-end:]}"


def _write_cells(axes: Any, counts: Tensor, shares: Tensor, *, cell: float) -> None:
    """Writes count and share into the cells, of so many inches."""
    letters = max(4, len(f"{int(counts.max()):,}"))
    # A digit is about 0.62 of the font's size wide, which is in points of 1/72 inch.
    font_size = min(9.0, 0.86 * 72 * cell / (0.62 * letters))
    for row, column in counts.nonzero().tolist():
        share = float(shares[row, column])
        axes.text(
            *(column, row, f"{int(counts[row, column]):,}\n{share:.0%}"),
            ha="center",
            va="center",
            fontsize=font_size,
            linespacing=1.25,
            color="white" if share > 0.55 else _INK,
        )


def pattern_figure(config: Any, *, seq_len: int | None = None) -> "Figure":
    """Draws who attends to whom in a model; of many heads the first 8.

    Args:
        config: Config of the model, with `pattern`, `num_heads` and `is_causal`.
        seq_len: Tokens to draw; None takes what is usual for the model. It is halved as long as
            the shortest segment could not be seen.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.

    Raises:
        ValueError: `seq_len` is below 1.
    """
    length = config.usual_seq_len if seq_len is None else seq_len
    heads = tuple(range(min(config.num_heads, _MAX_HEADS)))
    while True:
        try:
            return plot_pattern(
                config.pattern,
                seq_len=length,
                num_heads=config.num_heads,
                is_causal=config.is_causal,
                heads=heads,
            )
        except ValueError:
            if length < 2:
                raise
            length //= 2


def curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str) -> "Figure":
    """Draws loss and accuracy of a classifier against the optimizer step.

    Args:
        curves: Metrics by name, as `read_curves` returns them.
        title: Written above both panels.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    loss, accuracy = figure.subplots(1, 2)
    _draw_curve(loss, curves, "train_loss", "training", color=_PALE_BLUE, linewidth=1.0)
    _draw_curve(loss, curves, "val_loss", "validation", color=_ORANGE, marker="o", markersize=4)
    loss.set_title("Loss (cross-entropy, nats)", loc="left", fontsize=11)
    _draw_curve(accuracy, curves, "val_accuracy", "accuracy", color=_BLUE, marker="o", markersize=4)
    options = {"color": _ORANGE, "marker": "o", "markersize": 4, "linestyle": "--"}
    _draw_curve(accuracy, curves, "val_balanced_accuracy", "mean recall of the classes", **options)
    accuracy.set_title("Validation", loc="left", fontsize=11)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (loss, accuracy):
        axes.set_ylim(0, 1.02 if axes is accuracy else None)
        axes.set_xlabel("optimizer step", color=_QUIET)
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GRID)
        axes.tick_params(colors=_QUIET)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def _draw_curve(
    axes: Any,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    name: str,
    label: str,
    **style: Any,
) -> None:
    points = curves.get(name, ())
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def log_figure(trainer: L.Trainer, name: str, figure: "Figure") -> None:
    """Puts a figure into the run folder as `NAME.png`, and into the loggers that show pictures.

    These are TensorBoard and every logger with Lightning's `log_image`, such as Weights & Biases.
    Only the first process writes, and nothing does in a `fast_dev_run`.

    Args:
        trainer: The trainer.
        name: What it shows, such as "confusion".
        figure: The figure.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return
    folder = Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    _take_literally(figure)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, global_step=trainer.global_step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(path)])


def log_examples(trainer: L.Trainer, split: str, figure: "Figure") -> None:
    """Puts a picture of held-out samples into the run folder, and says where it is.

    Args:
        trainer: The trainer; see `log_figure`.
        split: "val" or "test".
        figure: The picture.
    """
    name = f"{split}_examples"
    log_figure(trainer, name, figure)
    if trainer.is_global_zero and not trainer.fast_dev_run:
        print(f"Examples     {Path(trainer.default_root_dir) / name}.png")


def _take_literally(figure: "Figure") -> None:
    """Makes all texts plain: names and captions are the data's, which no picture may stop at.

    Otherwise two dollar signs begin a formula, which as a rule is an error, and so is a byte in the
    name of a file that is no UTF-8.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode(errors="replace").decode())
