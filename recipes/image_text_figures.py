"""The picture of a search: sentences, and the images found for them."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ShownPair", "find_pairs", "retrieval_figure"]

_INK, _QUIET, _LINE, _RIGHT = "#1f2933", "#7b8794", "#d3d9e0", "#2f9e5b"
# Inches of an image, of its caption and of the sentence.
_SIDE, _CAPTION, _SENTENCE, _GAP = 1.05, 0.3, 2.5, 0.18
_MIN_COLUMNS = 4
_MAX_SIDE = 256  # pixels of an image that are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownPair:
    """A pair to draw.

    Attributes:
        name: Its name.
        caption: Its caption.
        pixels: The image, (height, width, 3) in [0, 1].
    """

    name: str
    caption: str
    pixels: Tensor


def find_pairs(
    loader: Iterable[dict[str, Any]],
    keys: Iterable[tuple[int, int]],
    *,
    pixels: Callable[[Tensor], Tensor],
) -> dict[tuple[int, int], ShownPair]:
    """Reads a loader up to the last of the pairs that are wanted.

    Args:
        loader: Yields batches of pairs.
        keys: Image and text id of each pair.
        pixels: Makes (b, h, w, 3) in [0, 1] of the images of a batch.

    Returns:
        The pairs that were there.
    """
    wanted, found = set(keys), {}
    for batch in loader:
        ids = zip(batch["image_ids"].tolist(), batch["text_ids"].tolist(), strict=True)
        for place, key in enumerate(ids):
            if key in wanted and key not in found:
                image = pixels(batch["images"][place : place + 1])[0]
                step = -(-max(image.shape[:2]) // _MAX_SIDE)
                found[key] = ShownPair(
                    name=batch["names"][place],
                    caption=batch["captions"][place],
                    pixels=image[::step, ::step].clone(),
                )
        if len(found) == len(wanted):
            break
    return found


def retrieval_figure(
    queries: Sequence[str],
    rows: Sequence[Sequence[ShownPair]],
    *,
    is_right: Sequence[Sequence[bool]] | None = None,
) -> "Figure":
    """Draws the images found for each sentence, the best at the left.

    Args:
        queries: The sentences.
        rows: The images found for each.
        is_right: Which of them belong to the sentence, and get a green frame; None where nobody
            knows.

    Returns:
        A matplotlib figure that no global state knows of, so nobody has to close it.
    """
    from matplotlib.figure import Figure

    # Room for the heading where few images are searched.
    columns = max(_MIN_COLUMNS, *map(len, rows))
    pitch = _SIDE + _CAPTION + _GAP
    width = _SENTENCE + columns * (_SIDE + _GAP) + _GAP
    height = len(queries) * pitch + 0.75
    figure = Figure(figsize=(width, height))
    figure.text(
        *(_GAP / width, 1 - 0.3 / height, "Images found for a sentence"),
        **{"fontsize": 13, "fontweight": "bold", "color": _INK, "va": "center"},
    )
    if is_right is not None:
        hits = sum(map(any, is_right))
        note = f"green: belongs to the sentence, in {hits} of {len(queries)} rows"
        figure.text(
            *(1 - _GAP / width, 1 - 0.3 / height, note),
            **{"fontsize": 9, "color": _QUIET, "ha": "right", "va": "center"},
        )
    for number, (query, row) in enumerate(zip(queries, rows, strict=True)):
        bottom = height - 0.6 - (number + 1) * pitch + _CAPTION + _GAP
        figure.text(
            *(_GAP / width, (bottom + _SIDE / 2) / height, _wrapped(query, 24, 5)),
            **{"fontsize": 11, "color": _INK, "va": "center"},
        )
        for column, pair in enumerate(row):
            left = _SENTENCE + column * (_SIDE + _GAP)
            axes = figure.add_axes((left / width, bottom / height, _SIDE / width, _SIDE / height))
            right = is_right is not None and is_right[number][column]
            _draw(axes, pair, is_right=right)
    return figure


def _draw(axes: Any, pair: ShownPair, *, is_right: bool) -> None:
    axes.imshow(pair.pixels.numpy(), interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    colour = _RIGHT if is_right else _LINE
    axes.spines[:].set_color(colour)
    axes.spines[:].set_linewidth(3 if is_right else 0.8)
    axes.set_xlabel(
        _wrapped(pair.caption, 22, 2),
        **{"fontsize": 6.5, "color": _RIGHT if is_right else _QUIET, "labelpad": 3},
    )


def _wrapped(text: str, letters: int, lines: int) -> str:
    found = textwrap.wrap(text, letters, max_lines=lines, placeholder=" …")
    return "\n".join(found)
