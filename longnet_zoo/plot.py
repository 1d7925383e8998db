"""A picture of a dilated pattern: which query attends to which key, one panel per head.

matplotlib is imported inside the functions, so `import longnet_zoo` works without it. Lengths are
in inches; at 160 dots per inch every cell is a whole number of pixels.

Shape legend: h num_heads, n seq_len.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longnet_zoo.ops.pattern import DilatedPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DOTS_PER_INCH", "plot_pattern"]

DOTS_PER_INCH = 160

# Longer sequences are drawn to scale, with cells that are still large enough to see.
_MAX_CELLS = 256
_MAX_CELLS_TO_SCALE = 128
_MAX_HEADS = 16
_CELL_LINES_UP_TO = 96

_MIN_PANEL = 2.3
_SINGLE_PANEL = 4.0
_MIN_WIDTH, _MAX_WIDTH = 6.0, 10.8
_LEFT, _RIGHT, _GAP = 0.4, 0.15, 0.2
_TITLES, _HEAD_TITLE, _KEY_LABEL = 0.75, 0.3, 0.3
_LEGEND_ROW, _LEGEND_COLUMN = 0.27, 2.05

# Hues told apart with any kind of colour vision (after Okabe and Ito, 2008), shortest branch first.
_HUES = ("#0b6fb8", "#e08a00", "#00916e", "#c0508f", "#7a5bd0", "#5aa9dd", "#a8641c", "#6b7280")
_GREY = "#6b7280"
_UNSEEN = "#f0efec"
_FUTURE = "#ffffff"
_FRAME = "#c9ced6"
_INK = "#24292f"
_FAINT_INK = "#5c6570"


def plot_pattern(
    pattern: DilatedPattern,
    *,
    seq_len: int,
    num_heads: int,
    is_causal: bool = False,
    heads: Sequence[int] | None = None,
    title: str = "Dilated attention: who attends to whom",
) -> Figure:
    """Draws who attends to whom: rows are queries, columns keys.

    The hue is the shortest branch that reaches a pair, the shade how many branches reach it: the
    softmax counts such a key that often. Zero keys (`padded_keys="zero"`) have no position and are
    not drawn. More than 256 tokens are drawn to scale: lengths divided by a power of two, dilation
    rates as they are, so that each branch keeps its share of the pairs.

    Args:
        pattern: The pattern.
        seq_len: Number of tokens.
        num_heads: Number of heads of the attention.
        is_causal: Whether a query sees only keys up to itself.
        heads: The heads to draw; all if None.
        title: The title.

    Returns:
        A matplotlib figure; `figure.savefig("pattern.png", dpi=160)` writes it, also SVG or PDF.

    Raises:
        ValueError: If `seq_len`, `num_heads` or `heads` is out of range, or a segment would
            vanish when drawn to scale.
        RuntimeError: If matplotlib is not installed.

    Example:
        >>> pattern = DilatedPattern(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
        >>> figure = plot_pattern(pattern, seq_len=64, num_heads=4)
    """
    drawn = _check_arguments(seq_len, num_heads, heads)
    small, num_cells, divisor = _shrink(pattern, seq_len)
    pixels, max_count = _paint(small, num_cells, num_heads, is_causal=is_causal)

    layout = _Layout.fit(len(drawn), num_cells, len(pattern.branches), has_shades=max_count > 1)
    figure, panels = _make_figure(layout)
    for panel, head in zip(panels, drawn, strict=True):
        _draw_head(panel, pixels[head], head)
    first_of_last_row = panels[(layout.rows - 1) * layout.columns]
    first_of_last_row.set_xlabel("key", fontsize=10, color=_FAINT_INK)
    first_of_last_row.set_ylabel("query", fontsize=10, color=_FAINT_INK)

    facts = _facts(pattern, seq_len, num_heads, is_causal=is_causal)
    if divisor > 1:
        facts += f", drawn at 1 : {divisor:,}"
    left, top = _LEFT / layout.width, layout.height
    figure.text(left, 1 - 0.32 / top, title, fontsize=13, weight="bold", color=_INK)
    figure.text(left, 1 - 0.56 / top, facts, fontsize=10, color=_FAINT_INK)
    _draw_legend(figure, layout, pattern, max_count)
    return figure


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Sizes of the figure in inches."""

    num_panels: int
    columns: int
    panel: float
    width: float
    legend_columns: int
    legend_rows: int

    @classmethod
    def fit(
        cls, num_panels: int, num_cells: int, num_branches: int, *, has_shades: bool
    ) -> _Layout:
        smallest = _SINGLE_PANEL if num_panels == 1 else _MIN_PANEL
        dots_per_cell = max(2, math.ceil(smallest * DOTS_PER_INCH / num_cells))
        panel = dots_per_cell * num_cells / DOTS_PER_INCH
        columns = int((_MAX_WIDTH - _LEFT - _RIGHT + _GAP) / (panel + _GAP))
        # As few rows as possible, then as even as possible.
        columns = math.ceil(num_panels / math.ceil(num_panels / columns))
        width = max(_LEFT + columns * (panel + _GAP) - _GAP + _RIGHT, _MIN_WIDTH)
        legend_columns = int((width - _LEFT) / _LEGEND_COLUMN)
        return cls(
            num_panels=num_panels,
            columns=columns,
            panel=panel,
            width=width,
            legend_columns=legend_columns,
            legend_rows=math.ceil(num_branches / legend_columns) + has_shades,
        )

    @property
    def rows(self) -> int:
        return math.ceil(self.num_panels / self.columns)

    @property
    def height(self) -> float:
        panels = self.rows * (_HEAD_TITLE + self.panel)
        return _TITLES + panels + _KEY_LABEL + self.legend_rows * _LEGEND_ROW + 0.1

    def corner(self, place: int) -> tuple[float, float]:
        """Left and bottom of a panel."""
        row, column = divmod(place, self.columns)
        left = _LEFT + column * (self.panel + _GAP)
        return left, self.height - _TITLES - (row + 1) * (_HEAD_TITLE + self.panel)


def _check_arguments(seq_len: int, num_heads: int, heads: Sequence[int] | None) -> tuple[int, ...]:
    for name, value in (("seq_len", seq_len), ("num_heads", num_heads)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    drawn = tuple(range(num_heads)) if heads is None else tuple(heads)
    if not drawn or len(drawn) > _MAX_HEADS or not all(0 <= head < num_heads for head in drawn):
        raise ValueError(
            f"heads must name 1 to {_MAX_HEADS} heads between 0 and {num_heads - 1}, got {drawn}. "
            "Pass for example heads=(0, 1, 2, 3)."
        )
    return drawn


def _shrink(pattern: DilatedPattern, seq_len: int) -> tuple[DilatedPattern, int, int]:
    """Divides lengths by a power of two until the sequence can be drawn; returns it last."""
    divisor = 1
    if seq_len <= _MAX_CELLS:
        return pattern, seq_len, divisor
    while seq_len > _MAX_CELLS_TO_SCALE * divisor:
        divisor *= 2
    lengths = tuple(length // divisor for length in pattern.segment_lengths)
    try:
        small = DilatedPattern(
            segment_lengths=lengths,
            dilation_rates=pattern.dilation_rates,
            head_offset=pattern.head_offset,
        )
    except ValueError as error:
        raise ValueError(
            f"seq_len={seq_len} is too long for a picture of segment_lengths="
            f"{pattern.segment_lengths}: drawn at 1 : {divisor}, the segments are {lengths}, too "
            f"short for dilation_rates={pattern.dilation_rates}. Choose a smaller seq_len."
        ) from error
    return small, seq_len // divisor, divisor


def _paint(
    pattern: DilatedPattern, seq_len: int, num_heads: int, *, is_causal: bool
) -> tuple[Tensor, int]:
    """Colours of all pairs, RGB (num_heads, n, n, 3), and the most branches that reach one."""
    masks = []
    for segment_length, rate in pattern.branches:
        branch = DilatedPattern(
            segment_lengths=(segment_length,),
            dilation_rates=(rate,),
            head_offset=pattern.head_offset,
        )
        masks.append(branch.mask_counts(seq_len, num_heads, is_causal=is_causal))
    reached = torch.stack(masks, dim=-1)  # (h, n, n, branches)
    counts = reached.sum(-1)
    shortest = reached.argmax(-1)
    palette = torch.tensor(
        [
            [_shade(_hue(branch), count, len(masks)) for count in range(1, len(masks) + 1)]
            for branch in range(len(masks))
        ]
    )
    pixels = palette[shortest, counts.clamp(min=1) - 1]
    pixels[counts == 0] = torch.tensor(_rgb(_UNSEEN))
    if is_causal:
        future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
        pixels[:, future] = torch.tensor(_rgb(_FUTURE))
    return pixels, int(counts.max())


def _hue(branch: int) -> str:
    return _HUES[branch % len(_HUES)]


def _shade(hue: str, count: int, num_branches: int) -> tuple[float, float, float]:
    """A hue, pale where one branch reaches the pair, darker with each further one."""
    depth = 0.0 if num_branches == 1 else (count - 1) / (num_branches - 1)
    pale = 0.42 * max(0.0, 1.0 - 2.0 * depth)
    dark = 0.55 * max(0.0, 2.0 * depth - 1.0)
    red, green, blue = ((channel + (1.0 - channel) * pale) * (1.0 - dark) for channel in _rgb(hue))
    return red, green, blue


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))


def _facts(pattern: DilatedPattern, seq_len: int, num_heads: int, *, is_causal: bool) -> str:
    pairs = pattern.attended_pairs(seq_len, num_heads, is_causal=is_causal)
    dense = num_heads * (seq_len * (seq_len + 1) // 2 if is_causal else seq_len**2)
    kind = "causal" if is_causal else "bidirectional"
    percent = 100 * pairs / dense
    share = f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"
    return f"{kind}, {seq_len:,} tokens, {share} % of dense work"


def _make_figure(layout: _Layout) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "drawing a pattern needs matplotlib. Install it: pip install matplotlib"
        ) from error
    width, height, panel = layout.width, layout.height, layout.panel
    figure = Figure(figsize=(width, height), facecolor="white")
    panels = []
    for place in range(layout.num_panels):
        left, bottom = layout.corner(place)
        panels.append(
            figure.add_axes((left / width, bottom / height, panel / width, panel / height))
        )
    return figure, panels


def _draw_head(panel: Axes, pixels: Tensor, head: int) -> None:
    num_cells = pixels.shape[0]
    panel.imshow(pixels.numpy(), interpolation="none", origin="upper")
    panel.set_title(f"head {head}", fontsize=10.5, color=_INK, pad=5)
    panel.set_xticks([])
    panel.set_yticks([])
    if num_cells <= _CELL_LINES_UP_TO:
        lines = [place - 0.5 for place in range(1, num_cells)]
        panel.hlines(lines, -0.5, num_cells - 0.5, colors="white", linewidth=0.35)
        panel.vlines(lines, -0.5, num_cells - 0.5, colors="white", linewidth=0.35)
    for spine in panel.spines.values():
        spine.set_color(_FRAME)
        spine.set_linewidth(0.8)


def _draw_legend(figure: Figure, layout: _Layout, pattern: DilatedPattern, max_count: int) -> None:
    num_branches = len(pattern.branches)
    for place, (length, rate) in enumerate(pattern.branches):
        color = _shade(_hue(place), 1, num_branches)
        _draw_entry(figure, layout, place, [color], f"segment {length:,}, rate {rate}")
    if max_count > 1:
        shades = [_shade(_GREY, count, num_branches) for count in range(2, max_count + 1)]
        counts = {2: "2", 3: "2 or 3"}.get(max_count, f"2 to {max_count}")
        words = f"darker: reached by {counts} branches, and counted as often"
        _draw_entry(figure, layout, (layout.legend_rows - 1) * layout.legend_columns, shades, words)


def _draw_entry(
    figure: Figure,
    layout: _Layout,
    place: int,
    colors: Sequence[tuple[float, float, float]],
    words: str,
) -> None:
    from matplotlib.patches import Rectangle

    width, height, side = layout.width, layout.height, 0.13
    row, column = divmod(place, layout.legend_columns)
    left = _LEFT + column * _LEGEND_COLUMN
    bottom = (layout.legend_rows - row) * _LEGEND_ROW - 0.12
    for color in colors:
        swatch = Rectangle(
            (left / width, bottom / height), side / width, side / height, facecolor=color
        )
        figure.add_artist(swatch)
        left += side + 0.03
    figure.text(
        (left + 0.05) / width,
        (bottom + side / 2) / height,
        words,
        fontsize=10,
        color=_INK,
        verticalalignment="center_baseline",
    )
