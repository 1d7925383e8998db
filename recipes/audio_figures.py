"""Pictures of what an audio model heard: spectrograms with classes, and with events below them."""

import dataclasses
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .figures import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClipExample", "TagExample", "clips_figure", "tags_figure"]

_INK, _QUIET, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_BLUE, _PALE_BLUE, _ORANGE = "#2563a8", "#b9cfe6", "#d9730d"
_MAX_COLUMNS = 4
# Letters of a class or a name over a spectrogram, of a path over a whole picture, and of a heading
# on an inch.
_MAX_CLASS, _MAX_NAME, _MAX_PATH, _TITLE_LETTERS_PER_INCH = 12, 36, 80, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipExample:
    """A recording with its class and what a model took it for.

    Attributes:
        log_mel: Natural logarithm of the power, (columns, mels).
        seconds: Its length.
        name: Path or name.
        true: Its class.
        predicted: The class a model says.
        probability: The probability of that.
    """

    log_mel: Tensor
    seconds: float
    name: str
    true: str
    predicted: str
    probability: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagExample:
    """A recording with its events and the probability of each class in each frame.

    Attributes:
        log_mel: Natural logarithm of the power, (columns, mels).
        seconds: Its length.
        name: Path or name.
        class_names: Names of the classes.
        events: Start and end in seconds, and class.
        probabilities: What a model says, (frames, classes).
        threshold: Probability from which on it says that a class is heard.
    """

    log_mel: Tensor
    seconds: float
    name: str
    class_names: tuple[str, ...]
    events: list[tuple[float, ...]]
    probabilities: Tensor
    threshold: float


def clips_figure(examples: list[ClipExample], *, title: str) -> "Figure":
    """Draws spectrograms of recordings, each with its class and what a model took it for.

    Args:
        examples: One or more.
        title: The title.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.
    """
    from matplotlib.figure import Figure

    examples = sorted(examples, key=lambda example: example.true)
    columns = min(_MAX_COLUMNS, len(examples))
    rows = -(-len(examples) // columns)
    width = 2.9 * columns + 0.3
    figure = Figure(figsize=(width, 2.05 * rows + 0.7), layout="constrained")
    title = textwrap.fill(title, int(width * _TITLE_LETTERS_PER_INCH))
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=_INK)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, example in zip(grid, examples, strict=False):
        _draw_spectrogram(axes, example.log_mel, example.seconds)
        is_right = example.true == example.predicted
        true, predicted = (
            shortened(name, _MAX_CLASS) for name in (example.true, example.predicted)
        )
        verdict = f"{predicted} {example.probability:.0%}"
        text = verdict if is_right else f"{verdict}, is {true}"
        axes.set_title(text, loc="left", fontsize=9, pad=14, color=_BLUE if is_right else _ORANGE)
        name = shortened(Path(example.name).stem, _MAX_NAME)
        axes.text(0, 1.03, name, transform=axes.transAxes, fontsize=7.5, color=_QUIET)
    for axes in grid[len(examples) :]:
        axes.set_visible(False)
    return figure


def tags_figure(example: TagExample) -> "Figure":
    """Draws the spectrogram of a recording, and below it what is heard and what a model hears.

    Args:
        example: The recording.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    number = len(example.class_names)
    figure = Figure(figsize=(12, 3.2 + 0.34 * number), layout="constrained")
    title = f"What is heard when: {shortened(example.name, _MAX_PATH)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 0.34 * number + 0.4])
    _draw_spectrogram(above, example.log_mel, example.seconds)
    above.set_xlabel("")
    frame = example.seconds / len(example.probabilities)
    for row in range(number):
        true = [(start, end - start) for start, end, tag in example.events if tag == row]
        below.broken_barh(true, (row - 0.4, 0.8), color=_PALE_BLUE)
        heard = (example.probabilities[:, row] >= example.threshold).tolist()
        for place, is_heard in enumerate(heard):
            if not is_heard:
                continue
            middle = (place + 0.5) * frame
            is_right = any(start <= middle <= start + length for start, length in true)
            color = _BLUE if is_right else _ORANGE
            below.broken_barh([(place * frame, frame)], (row - 0.16, 0.32), color=color, lw=0)
    below.set_ylim(number - 0.45, -0.55)
    below.set_yticks(range(number), [shortened(name) for name in example.class_names])
    below.set_xlim(0, example.seconds)
    below.set_xlabel("seconds", color=_QUIET)
    below.grid(axis="x", color=_GRID)
    below.set_axisbelow(True)
    _quieten(below)
    below.legend(
        handles=[
            Patch(color=_PALE_BLUE, label="is heard"),
            Patch(color=_BLUE, label="found"),
            Patch(color=_ORANGE, label="found, but is not there"),
        ],
        **{"loc": "lower right", "bbox_to_anchor": (1, 1.0), "ncols": 3, "frameon": False},
        fontsize=9,
    )
    return figure


def _draw_spectrogram(axes: Any, log_mel: Tensor, seconds: float) -> None:
    picture = log_mel.T.numpy()
    # Natural logarithm of the power: what is 50 dB below the loudest is dark.
    top = float(picture.max())
    extent = (0.0, seconds, 0.0, 1.0)
    axes.imshow(
        picture,
        **{"origin": "lower", "aspect": "auto", "extent": extent, "cmap": "magma"},
        vmin=max(float(picture.min()), top - 11.5),
        vmax=top,
        interpolation="nearest",
    )
    axes.set_yticks([])
    axes.set_ylabel("mel bands", color=_QUIET, fontsize=8)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("seconds", color=_QUIET, fontsize=8, labelpad=1)
    _quieten(axes)


def _quieten(axes: Any) -> None:
    axes.tick_params(length=0, colors=_QUIET, labelsize=8)
    for label in axes.get_yticklabels():
        label.set_color(_INK)
    axes.spines[:].set_visible(False)
