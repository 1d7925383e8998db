"""Pathfinder-style images (Linsley et al., arXiv 1805.08315): are two dots on one dashed curve?

An image has two dashed curves of the same length, shorter ones as distractors, and two dots. The
label is yes where the dots are the two ends of one curve, and no where they are ends of different
ones. Sizes follow the generator of Long Range Arena (`pathfinder.py`): at 32 pixels 14 dashes of
length 2 and thickness 0.5, dots of radius 1.5, 5 distractors of 4 dashes, starts at least 7 apart,
contrast 0.75; at 128 pixels 14 dashes of length 5 and thickness 1.5, gaps of 2 to 3, dots of radius
3, 7 distractors of 4 dashes, starts at least 20 apart.

This is no copy of that generator, so figures do not compare with published ones digit by digit. Of
our own making are: how far a curve turns from dash to dash, how near curves come to each other, the
drawing (coverage by distance, in 256 greys, where the original draws with OpenCV), and other sizes
than these two: 64 pixels have the sizes of 32 and longer curves, 256 pixels those of 128.

Pixels are tokens, in rows from the top; the answer is read at the last one. `images` gives them to
a model of images.

Shape legend: b batch, m points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from .task import IGNORE_INDEX, Example, Task

__all__ = ["Pathfinder", "PathfinderSizes"]

_NUM_GREYS = 256
# Points that stand for a dash where distances between dashes are checked.
_POINTS_PER_DASH = 4
_SHARES = np.linspace(0, 1, _POINTS_PER_DASH)[:, None]
_TRIES_PER_DASH = 12
_TRIES_PER_CURVE = 200
_DASHES_TAKEN_BACK = 3


@dataclass(frozen=True, kw_only=True)
class PathfinderSizes:
    """Sizes of what is drawn, in pixels unless said otherwise.

    Attributes:
        num_dashes: Dashes of a curve.
        dash_length: Length of a dash.
        gap: Shortest and longest distance from dash to dash.
        thickness: Thickness of a dash.
        clearance: Least distance between dashes that are not neighbours on a curve.
        dot_radius: Radius of a dot.
        start_distance: Least distance between the starts of the two curves.
        num_distractors: Number of short curves.
        distractor_dashes: Dashes of each.
        max_turn: Largest angle between neighbouring dashes, in radians.
        contrast: Brightness of the curves, where dots have 1.
    """

    num_dashes: int
    dash_length: float
    gap: tuple[float, float]
    thickness: float
    clearance: float
    dot_radius: float
    start_distance: float
    num_distractors: int
    distractor_dashes: int
    max_turn: float
    contrast: float = 0.75


_SMALL: dict[str, Any] = {
    "dash_length": 2.0,
    "gap": (1.0, 1.0),
    "thickness": 0.5,
    "clearance": 2.0,
    "dot_radius": 1.5,
    "max_turn": 0.9,
}
_LARGE: dict[str, Any] = {
    "dash_length": 5.0,
    "gap": (2.0, 3.0),
    "thickness": 1.5,
    "clearance": 5.0,
    "dot_radius": 3.0,
    "max_turn": 0.6,
}
# By the side of the image.
_SIZES = {
    32: PathfinderSizes(
        num_dashes=14, start_distance=7.0, num_distractors=5, distractor_dashes=4, **_SMALL
    ),
    64: PathfinderSizes(
        num_dashes=28, start_distance=14.0, num_distractors=10, distractor_dashes=7, **_SMALL
    ),
    128: PathfinderSizes(
        num_dashes=14, start_distance=20.0, num_distractors=7, distractor_dashes=4, **_LARGE
    ),
    256: PathfinderSizes(
        num_dashes=28, start_distance=40.0, num_distractors=14, distractor_dashes=7, **_LARGE
    ),
}


class _NoRoomError(Exception):
    """A curve has nowhere to go."""


@dataclass(frozen=True, kw_only=True)
class Pathfinder(Task):
    """Options of the task.

    Attributes:
        seq_len: Pixels of an image: 1,024, 4,096, 16,384 or 65,536, of 32 to 256 on a side.
    """

    seq_len: int = 1024

    name: ClassVar[str] = "pathfinder"

    def __post_init__(self) -> None:
        lengths = [side**2 for side in _SIZES]
        if type(self.seq_len) is not int or self.seq_len not in lengths:
            raise ValueError(
                f"seq_len must be the pixels of a square image, one of {lengths}, got "
                f"{self.seq_len!r}."
            )

    @property
    def side(self) -> int:
        """Pixels on a side."""
        return math.isqrt(self.seq_len)

    @property
    def sizes(self) -> PathfinderSizes:
        """Sizes of what is drawn."""
        return _SIZES[self.side]

    @property
    def vocab_size(self) -> int:
        """The greys, no and yes."""
        return _NUM_GREYS + 2

    @property
    def num_labels(self) -> int:
        """Yes or no."""
        return 1

    @property
    def chance(self) -> float:
        """One of two."""
        return 0.5

    def draw(self, rng: np.random.Generator) -> Example:
        """Draws an example."""
        is_yes = bool(rng.integers(2))
        labels = np.full(self.seq_len, IGNORE_INDEX)
        labels[-1] = _NUM_GREYS + is_yes
        while True:
            try:
                curves = _lay_curves(rng, self.sizes, self.side)
            except _NoRoomError:
                continue
            break
        dots = _dots(rng, curves, is_yes=is_yes)
        return Example(_paint(curves, dots, self.sizes, self.side).reshape(-1), labels)

    def images(self, tokens: Tensor) -> Tensor:
        """Returns pixels (b, seq_len) as normalised images, float32 (b, 1, side, side)."""
        greys = tokens.float().view(-1, 1, self.side, self.side) / (_NUM_GREYS - 1)
        return (greys - 0.5) / 0.5

    def classes(self, labels: Tensor) -> Tensor:
        """Returns answers as classes, 0 for no and 1 for yes."""
        return labels - _NUM_GREYS


# A dash is its two ends, ((x, y), (x, y)); a curve its dashes, float64 (dashes, 2, 2).
Curve = np.ndarray


def _lay_curves(rng: np.random.Generator, sizes: PathfinderSizes, side: int) -> list[Curve]:
    """Lays the two curves, and beside them the distractors.

    Raises:
        _NoRoomError: They do not fit as they began.
    """
    curves: list[Curve] = []
    taken = np.empty((0, 2))
    for number in [sizes.num_dashes] * 2 + [sizes.distractor_dashes] * sizes.num_distractors:
        away = curves[0][0, 0] if len(curves) == 1 else None
        curve = _lay_curve(rng, sizes, side, number, taken, away)
        curves.append(curve)
        taken = np.concatenate([taken, _points(curve)])
    return curves


def _lay_curve(
    rng: np.random.Generator,
    sizes: PathfinderSizes,
    side: int,
    num_dashes: int,
    taken: np.ndarray,
    away: np.ndarray | None,
) -> Curve:
    """Lays a curve dash by dash; where it is stuck, it takes the last dashes back."""
    dashes: list[np.ndarray] = []
    angles: list[float] = []
    for _ in range(_TRIES_PER_CURVE):
        start, angle = _next_start(rng, sizes, side, dashes, angles)
        if not dashes and away is not None and _distance(start, away) < sizes.start_distance:
            continue
        # A neighbour on the curve may be near.
        own = _points(np.stack(dashes[:-1])) if len(dashes) > 1 else np.empty((0, 2))
        found = _next_dash(rng, sizes, side, start, angle, np.concatenate([taken, own]))
        if found is None:
            kept = max(0, len(dashes) - _DASHES_TAKEN_BACK)
            del dashes[kept:], angles[kept:]
            continue
        dashes.append(found[0])
        angles.append(found[1])
        if len(dashes) == num_dashes:
            return np.stack(dashes)
    raise _NoRoomError


def _next_start(
    rng: np.random.Generator,
    sizes: PathfinderSizes,
    side: int,
    dashes: list[np.ndarray],
    angles: list[float],
) -> tuple[np.ndarray, float]:
    """Returns where the next dash starts, and the angle of the one before."""
    if not dashes:
        border = sizes.dot_radius + 1
        return rng.uniform(border, side - border, 2), rng.uniform(0, 2 * math.pi)
    ahead = np.array([math.cos(angles[-1]), math.sin(angles[-1])])
    return dashes[-1][1] + rng.uniform(*sizes.gap) * ahead, angles[-1]


def _next_dash(
    rng: np.random.Generator,
    sizes: PathfinderSizes,
    side: int,
    start: np.ndarray,
    angle: float,
    taken: np.ndarray,
) -> tuple[np.ndarray, float] | None:
    """Finds a dash from `start` on that is clear of all others, and its angle."""
    angles = angle + rng.uniform(-sizes.max_turn, sizes.max_turn, _TRIES_PER_DASH)
    ends = start + sizes.dash_length * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = start + _SHARES * (ends[:, None] - start)
    border = sizes.dot_radius + 1
    is_free = ((points > border) & (points < side - border)).all((1, 2))
    if len(taken):
        # |p - t|^2 by a product of matrices, most of the work of an example.
        flat = points.reshape(-1, 2)
        squares = (flat**2).sum(1)[:, None] + (taken**2).sum(1) - 2 * flat @ taken.T
        is_clear = (squares > sizes.clearance**2).all(1)
        is_free &= is_clear.reshape(len(ends), -1).all(1)
    if not is_free.any():
        return None
    chosen = int(is_free.argmax())
    return np.stack([start, ends[chosen]]), float(angles[chosen])


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second))


def _points(curve: Curve) -> np.ndarray:
    """Returns points along each dash, (m, 2)."""
    return (curve[:, :1] + _SHARES * (curve[:, 1:] - curve[:, :1])).reshape(-1, 2)


def _dots(rng: np.random.Generator, curves: list[Curve], *, is_yes: bool) -> np.ndarray:
    """Returns the places of the two dots, (2, 2)."""
    ends = [(curve[0, 0], curve[-1, 1]) for curve in curves[:2]]
    if is_yes:
        return np.stack(ends[rng.integers(2)])
    first, second = rng.integers(2, size=2)
    return np.stack([ends[0][first], ends[1][second]])


def _paint(curves: list[Curve], dots: np.ndarray, sizes: PathfinderSizes, side: int) -> np.ndarray:
    """Returns the greys of the pixels, int64 (side, side)."""
    image = np.zeros((side, side))
    for start, end in np.concatenate(curves):
        _stroke(image, start, end, radius=sizes.thickness / 2, brightness=sizes.contrast)
    for dot in dots:
        _stroke(image, dot, dot, radius=sizes.dot_radius, brightness=1.0)
    return np.rint((_NUM_GREYS - 1) * image).astype(np.int64)


def _stroke(
    image: np.ndarray, start: np.ndarray, end: np.ndarray, *, radius: float, brightness: float
) -> None:
    """Brightens what lies within `radius` of a line, half a pixel at its edge in part."""
    reach = radius + 0.5
    low = np.floor(np.minimum(start, end) - reach).astype(int).clip(0)
    high = np.ceil(np.maximum(start, end) + reach).astype(int) + 1
    x, y = np.meshgrid(*(np.arange(a, min(b, len(image))) for a, b in zip(low, high, strict=True)))
    pixels = np.stack([x, y], axis=-1) + 0.5
    along = end - start
    share = ((pixels - start) @ along / max(along @ along, 1e-9)).clip(0, 1)
    distance = np.linalg.norm(pixels - start - share[..., None] * along, axis=-1)
    cover = brightness * (reach - distance).clip(0, 1)
    window = image[low[1] : low[1] + len(x), low[0] : low[0] + x.shape[1]]
    np.maximum(window, cover, out=window)
