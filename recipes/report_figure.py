"""Draws the four panels of a run report."""

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.context import ContextFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_report"]

Curves = dict[str, list[tuple[int, float]]]

_INK, _QUIET, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_BLUE, _PALE_BLUE, _ORANGE, _GREEN = "#2563a8", "#b9cfe6", "#d9730d", "#2f855a"
_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def draw_report(*, title: str, curves: Curves, figures: ContextFigures) -> bytes:
    """Draws loss, bits per byte against position, throughput and the comparison.

    Args:
        title: Written above all panels.
        curves: Metrics by name, as `read_curves` returns them.
        figures: Scores of the held-out windows.

    Returns:
        A PNG.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        # Not pyplot, which keeps global state and may look for a screen.
        figure = Figure(figsize=(12.5, 8.4), dpi=144, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12, hspace=0.04, wspace=0.04)
        _draw_loss(axes[0, 0], curves)
        _draw_positions(axes[0, 1], figures)
        _draw_throughput(axes[1, 0], curves)
        _draw_comparison(axes[1, 1], figures)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_loss(axes: "Axes", curves: Curves) -> None:
    steps, values = _columns(curves, "train_bits_per_byte")
    axes.plot(steps, values, color=_PALE_BLUE, linewidth=1, label="training, each step")
    axes.plot(steps, _smooth(values), color=_BLUE, linewidth=2, label="training, smoothed")
    val_steps, val_values = _columns(curves, "val_bits_per_byte")
    if len(val_steps):
        axes.plot(
            *(val_steps, val_values), "o-", color=_ORANGE, markersize=4.5, label="held-out files"
        )
        _note(axes, val_steps[-1], val_values[-1], f"{val_values[-1]:.3f}", color=_ORANGE, dy=9)
    if len(values):
        # The first steps of a new model would flatten all that follows.
        top = np.quantile(values, 0.97) if len(values) > 20 else values.max()
        everything = np.concatenate([values, val_values])
        axes.set_ylim(everything.min() - 0.15, max(top, everything.min() + 0.5) + 0.15)
    axes.set(title="Loss", xlabel="optimizer step", ylabel="bits per byte")
    axes.legend(loc="upper right")


def _draw_positions(axes: "Axes", figures: ContextFigures) -> None:
    drawn = [
        (figures.short, _ORANGE, f"the same tokens, context cut to {figures.short_context:,}"),
        (figures.full, _BLUE, f"whole context, {figures.context:,} tokens"),
    ]
    heights = []
    for curve, color, label in drawn:
        ranges = curve.steps()
        centres = [math.sqrt(max(1, start) * stop) for start, stop, _ in ranges]
        bits = [value for *_, value in ranges]
        axes.plot(centres, bits, "o-", color=color, linewidth=2, markersize=4.5, label=label)
        # The very first tokens are always hard, and would flatten the rest.
        heights += bits[1:] or bits
    near = figures.full.between(0, figures.near)
    far = figures.full.between(figures.far)
    for start, stop, mean, text in (
        (1, figures.near, near, f"first {figures.near:,}: {near:.3f}"),
        (figures.far, figures.context, far, f"beyond {figures.far:,}: {far:.3f}"),
    ):
        if math.isnan(mean):
            continue
        axes.hlines(mean, start, stop, color=_INK, linestyle=(0, (4, 2)), linewidth=1.3)
        # The curve falls, so there is room above its start and below its end.
        x, dy = (start, 6) if start == 1 else (stop, -14)
        _note(axes, x, mean, text, color=_INK, dy=dy)
    low, high = _range([*heights, near, far])
    axes.set_ylim(low - 0.14 * (high - low) - 0.02, high + 0.3 * (high - low) + 0.02)
    ticks = [2**i for i in range(0, figures.context.bit_length(), 2)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(
        title="Bits per byte against position, held-out files",
        xlabel="position in the context (tokens, log scale)",
        ylabel="bits per byte",
        xlim=(1, figures.context),
    )
    axes.legend(loc="upper right", fontsize=9)


def _draw_throughput(axes: "Axes", curves: Curves) -> None:
    steps, values = _columns(curves, "tokens_per_second")
    axes.plot(steps, values, color=_GREEN, linewidth=1.6)
    if len(values):
        median = float(np.median(values))
        axes.axhline(median, color=_INK, linestyle=(0, (4, 2)), linewidth=1.2)
        axes.text(
            *(0.02, 0.93, f"median {median:,.0f}"), transform=axes.transAxes, fontweight="bold"
        )
        axes.set_ylim(0, max(values) * 1.25)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(title="Throughput", xlabel="optimizer step", ylabel="tokens per second")


def _draw_comparison(axes: "Axes", figures: ContextFigures) -> None:
    rows = [
        (f"context cut to {figures.short_context:,}", figures.short.between(), _ORANGE),
        (f"whole context, {figures.context:,}", figures.full.between(), _BLUE),
        (f"positions before {figures.near:,}", figures.full.between(0, figures.near), _QUIET),
        (f"positions from {figures.far:,}", figures.full.between(figures.far), _INK),
    ]
    values = [value for _, value, _ in rows]
    low, high = _range(values)
    margin = 0.25 * (high - low) + 0.02
    for place, (_, value, color) in enumerate(rows):
        if math.isnan(value):
            _note(axes, low, place, "no text there", color=color, dy=-3)
            continue
        axes.hlines(place, low - margin, value, color=_GRID, linewidth=2)
        axes.plot(value, place, "o", color=color, markersize=10)
        _note(axes, value, place, f"{value:.3f}", color=color, dy=9, ha="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], color=_INK)
    axes.grid(axis="y", visible=False)
    axes.set(
        title="The same model with less context",
        xlabel=f"bits per byte over {figures.num_windows:,} held-out windows (lower is better)",
        xlim=(low - margin, high + margin),
        ylim=(len(rows) - 0.5, -0.7),
    )


def _range(values: list[float]) -> tuple[float, float]:
    """Returns the lowest and the highest of the values that are numbers."""
    numbers = [value for value in values if not math.isnan(value)] or [0.0]
    return min(numbers), max(numbers)


def _note(axes: "Axes", x: float, y: float, text: str, **options: Any) -> None:
    dy = options.pop("dy")
    axes.annotate(
        text,
        (x, y),
        xytext=(0, dy),
        textcoords="offset points",
        fontsize=9.5,
        fontweight="bold",
        **{"ha": "left" if x <= 1 else "right", **options},
    )


def _columns(curves: Curves, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = np.array(curves.get(name, []), dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Averages over a window centred on each step, a thirtieth of the run."""
    if not len(values):
        return values
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    start, stop = np.maximum(0, place - half), np.minimum(len(values), place + half + 1)
    return (sums[stop] - sums[start]) / (stop - start)
