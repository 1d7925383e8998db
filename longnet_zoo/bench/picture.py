"""Line and bar charts of measured figures, SVG and PNG.

matplotlib is imported inside the functions, so that measuring needs it only for a picture.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Panel", "check_matplotlib", "draw", "save_picture"]

# Points (x, y) by name of the line.
Lines = Mapping[str, Sequence[tuple[float, float]]]

DOTS_PER_INCH = 160

# Hues told apart with any kind of colour vision (after Okabe and Ito, 2008).
_HUES = ("#0b6fb8", "#e08a00", "#00916e", "#c0508f", "#7a5bd0", "#5aa9dd", "#a8641c", "#6b7280")
_INK = "#24292f"
_FAINT_INK = "#5c6570"
_GRID = "#e3e5e8"
_PANEL_WIDTH, _PANEL_HEIGHT = 5.0, 3.4
_BAR_HEIGHT = 0.3


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart.

    Attributes:
        title: What is shown, with its unit.
        lines: Points (x, y) of each line, by its name; both axes are logarithmic.
        bars: Lengths of horizontal bars, by name; those whose names end in the same line share a
            colour.
        x_label: Name of the x axis.
        y_scale: `"log"`, or `"linear"` from zero, for lines.
    """

    title: str
    lines: Lines | None = None
    bars: Mapping[str, float] | None = None
    x_label: str = ""
    y_scale: Literal["log", "linear"] = "log"


def check_matplotlib() -> None:
    """Refuses early where a picture could not be drawn.

    Raises:
        RuntimeError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "drawing a picture needs matplotlib, which is not installed. Install the extra that "
            "has it: pip install 'longnet-zoo[train]'"
        )


def draw(panels: Sequence[Panel], *, title: str, facts: str) -> Figure:
    """Draws panels side by side under a title and a line of facts.

    Raises:
        RuntimeError: If matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    num_bars = max((len(panel.bars) for panel in panels if panel.bars is not None), default=0)
    height = max(_PANEL_HEIGHT, 1.2 + _BAR_HEIGHT * num_bars) + 0.6
    figure = Figure(figsize=(_PANEL_WIDTH * max(len(panels), 1), height), facecolor="white")
    figure.text(0.02, 1 - 0.27 / height, title, fontsize=13, weight="bold", color=_INK)
    figure.text(0.02, 1 - 0.5 / height, facts, fontsize=9, color=_FAINT_INK)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.set_title(panel.title, fontsize=10, color=_INK, loc="left")
        axes.tick_params(labelsize=8.5, colors=_FAINT_INK)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.lines is not None:
            _draw_lines(axes, panel, panel.lines)
        else:
            _draw_bars(axes, panel.bars or {})
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / height))
    return figure


def _draw_lines(
    axes: Axes, panel: Panel, lines: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    for place, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), "o-", color=_HUES[place % len(_HUES)], label=name)
    places = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{x:,.0f}" for x in places], rotation=30, ha="right")
    axes.minorticks_off()
    axes.set_yscale(panel.y_scale)
    values = [y for points in lines.values() for _, y in points]
    if panel.y_scale == "linear":
        axes.set_ylim(0, 1.1 * max(values))
    else:
        _label_powers(axes, values)
    axes.set_xlabel(panel.x_label, fontsize=9, color=_FAINT_INK)
    axes.grid(color=_GRID)
    axes.legend(fontsize=8.5, frameon=False)


def _label_powers(axes: Axes, values: Sequence[float]) -> None:
    """Labels a logarithmic axis at the powers of ten, also 2 and 5 times, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    is_wide = max(values) > 10_000 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(values) / 1.5, max(values) * 1.5)


def _draw_bars(axes: Axes, bars: Mapping[str, float]) -> None:
    kinds = list(dict.fromkeys(name.splitlines()[-1] for name in bars))
    colors = [_HUES[kinds.index(name.splitlines()[-1]) % len(_HUES)] for name in bars]
    drawn = axes.barh(list(bars), list(bars.values()), color=colors, height=0.7)
    axes.bar_label(drawn, [f" {_three_digits(value)}" for value in bars.values()], fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def save_picture(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Writes `path` with the suffixes .svg and .png; the same figure gives the same SVG."""
    from matplotlib import rc_context

    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "longnet_zoo"}):
        figure.savefig(svg, metadata={"Date": None})
    figure.savefig(png, dpi=DOTS_PER_INCH)
    return svg, png
