"""A picture of scenes: what is shown, heard and asked, the answer, and who attends to whom."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .figures import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SceneExample", "scenes_figure"]

_INK, _QUIET, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
# Told apart with any kind of colour vision (after Okabe and Ito, 2008).
_HUES = ("#0b6fb8", "#e08a00", "#00916e", "#c0508f", "#7a5bd0", "#a8641c")
# Letters of a line of a legend, of a question, a class, a modality, and of all families of a scene.
_MAX_LEGEND = 84
_MAX_QUESTION, _MAX_CLASS, _MAX_MODALITY, _MAX_FAMILIES = 40, 16, 10, 90
_RIGHT, _WRONG = "#00916e", "#c0392b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneExample:
    """A scene and what a model made of it.

    Attributes:
        frames: Pictures in [0, 255], (moments, channels, height, width), or None.
        log_mel: Spectrogram, (columns, mels), or None.
        seconds: Length of the scene.
        moment_seconds: Seconds from one picture to the next.
        families: What is heard in each moment.
        question: What is asked, or "".
        true: The answer.
        predicted: What the model says.
        probability: The probability of that.
        weights: Mean over heads of the attention across modalities, by pair of modalities (of the
            queries, of the keys): (n_query, n_key).
        times: Seconds of the tokens of modalities that have some, (n,).
    """

    frames: Tensor | None
    log_mel: Tensor | None
    seconds: float
    moment_seconds: float
    families: tuple[str, ...]
    question: str
    true: str
    predicted: str
    probability: float
    weights: Mapping[tuple[str, str], Tensor]
    times: Mapping[str, Tensor]


def scenes_figure(examples: Sequence[SceneExample], *, title: str) -> "Figure":
    """Draws scenes, one a row: strip and spectrogram, attention over time, attention by pair.

    The curves say how the attention of each modality is spread over the moments of the scene; the
    square, which share of its attention each modality (row) gives to each other one (column).

    Args:
        examples: The scenes.
        title: The title.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.3 * len(examples) + 0.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    rows = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]
    for row, example in zip(rows, examples, strict=True):
        left, right = row.subfigures(1, 2, width_ratios=(3, 1.15))
        strip, sound, over_time = left.subplots(3, 1, height_ratios=(1.1, 1, 1))
        _draw_strip(strip, example)
        _draw_sound(sound, example)
        _draw_over_time(over_time, example)
        _draw_shares(right.subplots(), example)
    return figure


def _draw_strip(axes: Any, example: SceneExample) -> None:
    is_right = example.true == example.predicted
    true, predicted = (shortened(name, _MAX_CLASS) for name in (example.true, example.predicted))
    answer = f"{predicted} ({example.probability:.0%})"
    truth = "" if is_right else f", but it is {true}"
    color = _RIGHT if is_right else _WRONG
    question = shortened(" ".join(example.question.split()), _MAX_QUESTION)
    asked = f"“{question}”  →  " if question else "→  "
    axes.set_title(f"{asked}{answer}{truth}", loc="left", fontsize=10, color=color)
    if example.frames is not None:
        for place, frame in enumerate(example.frames):
            start = place * example.moment_seconds
            # About square on paper.
            half = min(0.45 * example.moment_seconds, 0.055 * example.seconds)
            middle = start + example.moment_seconds / 2
            picture = frame.permute(1, 2, 0).numpy() / 255
            picture = picture[..., 0] if picture.shape[-1] == 1 else picture
            box = (middle - half, middle + half, 0, 1)
            axes.imshow(picture, extent=box, cmap="gray", aspect="auto", vmin=0, vmax=1)
    for place, family in enumerate(example.families):
        middle = (place + 0.5) * example.moment_seconds
        name = shortened(family, max(4, _MAX_FAMILIES // len(example.families)))
        axes.text(middle, -0.08, name, ha="center", va="top", fontsize=8, color=_QUIET)
    axes.set_ylim(-0.02, 1.02)
    _bare(axes, example)


def _draw_sound(axes: Any, example: SceneExample) -> None:
    if example.log_mel is not None:
        axes.imshow(
            example.log_mel.T.numpy(),
            extent=(0, example.seconds, 0, 1),
            origin="lower",
            aspect="auto",
            cmap="magma",
        )
        axes.set_ylabel("mel", fontsize=8, color=_QUIET)
    _bare(axes, example)


def _draw_over_time(axes: Any, example: SceneExample) -> None:
    """Draws how much attention each modality gives to the time around each token with one."""
    for number, name in enumerate(_names(example)):
        for key, times in example.times.items():
            given = example.weights[name, key].mean(0)
            style = "-" if key == next(iter(example.times)) else ":"
            marker = "o" if len(times) <= 16 else None
            axes.plot(
                times.tolist(),
                (given / given.max().clamp(min=1e-12)).tolist(),
                color=_HUES[number % len(_HUES)],
                linestyle=style,
                marker=marker,
                markersize=3,
                linewidth=1.2,
                label=f"{shortened(name, _MAX_MODALITY)} → {shortened(key, _MAX_MODALITY)}",
            )
    if axes.lines:
        letters = max(len(str(line.get_label())) for line in axes.lines)
        columns = max(1, min(6, _MAX_LEGEND // letters))
        axes.legend(fontsize=6.5, frameon=False, ncols=columns, loc="upper center")
    axes.set_ylim(0, 1.45)
    axes.set_ylabel("attention to\n(of its most)", fontsize=8, color=_QUIET)
    axes.set_xlabel("seconds", fontsize=8, color=_QUIET)
    axes.set_xlim(0, example.seconds)
    axes.set_yticks([])
    axes.tick_params(colors=_QUIET, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=_GRID)


def _draw_shares(axes: Any, example: SceneExample) -> None:
    names = _names(example)
    shares = [[float(example.weights[a, b].sum(-1).mean()) for b in names] for a in names]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, own in enumerate(shares):
        for column, share in enumerate(own):
            color = "white" if share > 0.55 else _INK
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=color)
    ticks = [shortened(name, _MAX_MODALITY) for name in names]
    axes.set_xticks(range(len(names)), ticks, fontsize=8)
    axes.set_yticks(range(len(names)), ticks, fontsize=8)
    axes.set_xlabel("attends to", fontsize=8, color=_QUIET)
    axes.set_title("Share of the attention", loc="left", fontsize=9, color=_INK)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)


def _names(example: SceneExample) -> list[str]:
    return list(dict.fromkeys(name for name, _ in example.weights))


def _bare(axes: Any, example: SceneExample) -> None:
    axes.set_xlim(0, example.seconds)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
