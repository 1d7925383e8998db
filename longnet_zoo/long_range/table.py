"""The figures of an evaluation as a table, and as lines over the length.

rich and matplotlib are imported inside the functions that need them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from longnet_zoo.bench import Panel, draw

from .evaluation import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["COLUMNS", "GUESSES", "accuracy_table", "draw_accuracy", "rows"]

COLUMNS = ("tokens", "model", "accuracy", "spread", "runs", "FLOPs", "training")
# Names of rows and lines that are no labels.
GUESSES = _CHANCE, _CONSTANT = "chance", "constant"
_GREY = "#6b7280"
_LONGEST_NAME = 30  # characters in a legend beside which a panel still shows its lines


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Returns a row of texts for each cell, and two for guessing at each length.

    Args:
        cells: Lengths first, as `evaluate` yields them.
    """
    found: list[tuple[str, ...]] = []
    for place, cell in enumerate(cells):
        if not place or cells[place - 1].seq_len != cell.seq_len:
            blank = [""] * 4
            found.append((f"{cell.seq_len:,}", _CHANCE, _percent(cell.chance), *blank))
            found.append(("", _CONSTANT, _percent(cell.majority), *blank))
        found.append(_row(cell))
    return found


def _row(cell: Cell) -> tuple[str, ...]:
    flops = f"{cell.flops:.2e}"
    training = "" if cell.train_flops is None else f"{cell.train_flops:.2e}"
    if not cell.accuracies:
        return "", cell.label, "-", cell.reason, "", flops, training
    runs = str(len(cell.accuracies))
    if len(cell.accuracies) > 1:
        # A mean hides that one run has learnt nothing.
        spread = ", ".join(_percent(share) for share in sorted(cell.accuracies))
    else:
        spread = f"{_percent(cell.low)} - {_percent(cell.high)}"
    return "", cell.label, _percent(cell.mean), spread, runs, flops, training


def _percent(share: float) -> str:
    # A passkey is guessed once in 50,000 times, which is not never.
    return f"{100 * share:.1f}" if share >= 5e-4 or share == 0 else f"{100 * share:.1g}"


def accuracy_table(cells: Sequence[Cell], *, title: str) -> Table:
    """Makes a table for rich.

    Args:
        cells: As for `rows`.
        title: What was asked.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = (
        f"accuracy in %, {cells[0].num_examples} examples a length; spread: each of several runs, "
        "of a single one the 95 % interval of its examples; constant: always the "
        "answer that is the most frequent in training examples; FLOPs: of one example, and of the "
        "training"
    )
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    for column in COLUMNS:
        is_text = column in ("model", "spread")
        # A label may be a path, which has no spaces to break at.
        table.add_column(
            column,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold" if column == "model" else "ellipsis",
        )
    for row in rows(cells):
        # A label may have brackets, which rich would read as markup.
        table.add_row(*map(Text, row), style="dim" if row[1] in GUESSES else None)
    return table


def draw_accuracy(evaluations: Mapping[str, Sequence[Cell]], *, title: str, facts: str) -> Figure:
    """Draws accuracy over length, a panel for each task, the spread as bars.

    Args:
        evaluations: Cells by the name of the task.
        title: The title.
        facts: What holds for all, in a line.

    Raises:
        RuntimeError: If matplotlib is not installed.
    """
    panels = [
        Panel(
            title=f"{name}: accuracy in %",
            lines=_lines(cells),
            x_label="tokens",
            y_scale="linear",
        )
        for name, cells in evaluations.items()
    ]
    figure = draw(panels, title=title, facts=facts)
    for axes, cells in zip(figure.axes, evaluations.values(), strict=True):
        _finish(axes, cells)
    return figure


def _lines(cells: Sequence[Cell]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if cell.accuracies:
            lines.setdefault(_line_name(cell.label), []).append((cell.seq_len, 100 * cell.mean))
    for name, field in ((_CHANCE, "chance"), (_CONSTANT, "majority")):
        lines[name] = sorted({(float(x.seq_len), 100 * getattr(x, field)) for x in cells})
    return lines


def _line_name(label: str) -> str:
    """Returns a label as matplotlib shows it, which hides `_x` and reads `$x$` as mathematics."""
    name = label.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _finish(axes: Axes, cells: Sequence[Cell]) -> None:
    """Adds the spread, and makes the lines of guesses a background."""
    styles = {_CHANCE: ":", _CONSTANT: "--"}
    for line in axes.get_lines():
        if line.get_label() in styles:
            line.set(color=_GREY, linestyle=styles[str(line.get_label())], marker="")
    colors = {str(line.get_label()): line.get_color() for line in axes.get_lines()}
    for cell in cells:
        if cell.accuracies:
            ends = [100 * (cell.mean - cell.low), 100 * (cell.high - cell.mean)]
            axes.errorbar(
                cell.seq_len,
                100 * cell.mean,
                yerr=[[max(0.0, end)] for end in ends],
                color=colors[_line_name(cell.label)],
                capsize=3,
            )
            shares = [100 * share for share in cell.accuracies]
            axes.plot([cell.seq_len] * len(shares), shares, "k.", markersize=3)
    axes.set_ylim(0, 105)
    lines, names = axes.get_legend_handles_labels()
    axes.legend(lines, [_shortened(name) for name in names], fontsize=8.5, frameon=False)


def _shortened(name: str) -> str:
    """Keeps the end of a long name, where paths differ."""
    return name if len(name) <= _LONGEST_NAME else f"\u2026{name[1 - _LONGEST_NAME :]}"
