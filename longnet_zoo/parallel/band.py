"""Which pairs of query rows and key rows see each other, as tiles that attention kernels serve.

Rows of two runs of equal step see each other in a band: key c and query a if a + low <= c and
c <= a + high. Causal attention sets `high`, a limited look back `low`. A kernel serves rectangles
("full") and squares of rows that see the keys up to their own ("causal"); "anti" squares see the
keys from their own on, which is causal attention with rows and keys in reverse order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

from .layout import Layout, Run, runs_of

__all__ = ["Sight", "Tile", "cut_band", "last_hops", "tiles_between"]

Kind = Literal["full", "causal", "anti"]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which keys a query sees, apart from the bounds of its sequence.

    Attributes:
        is_causal: Whether it sees no later key.
        max_lookback: How many keys it sees at most, itself included; None: all. Causal only.
    """

    is_causal: bool
    max_lookback: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Query rows and key rows that one kernel call serves.

    Attributes:
        rows: Query rows.
        keys: Key rows.
        kind: Row i sees all keys, those up to i, or those from i on.
        row_step: Positions between neighbouring rows, and between neighbouring keys.
        key_offset: Position of the first key minus that of the first query.
    """

    rows: range
    keys: range
    kind: Kind
    row_step: int = 1
    key_offset: int = 0


def tiles_between(
    queries: tuple[Run, ...],
    keys: tuple[Run, ...],
    sight: Sight,
    bounds: tuple[int, int],
) -> Iterator[Tile]:
    """Lists the tiles of a rank's queries and a rank's keys within one sequence.

    Args:
        queries: Positions of the query rows, run after run.
        keys: Positions of the key rows; all runs have the same step.
        sight: Which keys a query sees.
        bounds: First position of the sequence, and the one after its last.

    Yields:
        Tiles that cover each visible pair once; they count rows and keys from the first run on.
    """
    for (first_row, q_run), (first_key, k_run) in product(
        _runs_inside(queries, bounds), _runs_inside(keys, bounds)
    ):
        step, ahead = q_run.step, q_run.start - k_run.start
        low = None if sight.max_lookback is None else -((sight.max_lookback - 1 - ahead) // step)
        high = ahead // step if sight.is_causal else None
        for tile in cut_band(range(q_run.count), range(k_run.count), low, high):
            yield replace(
                tile,
                rows=_shifted(tile.rows, first_row),
                keys=_shifted(tile.keys, first_key),
                row_step=step,
                key_offset=(tile.keys.start - tile.rows.start) * step - ahead,
            )


def _runs_inside(runs: tuple[Run, ...], bounds: tuple[int, int]) -> Iterator[tuple[int, Run]]:
    """Cuts runs to the positions of a sequence: (number of the first row left, what is left)."""
    first = 0
    for run in runs:
        begin, end = (min(max(-((run.start - x) // run.step), 0), run.count) for x in bounds)
        if begin < end:
            yield first + begin, Run(run.start + begin * run.step, run.step, end - begin)
        first += run.count


def _shifted(rows: range, distance: int) -> range:
    return range(rows.start + distance, rows.stop + distance)


def cut_band(rows: range, keys: range, low: int | None, high: int | None) -> Iterator[Tile]:
    """Cuts the pairs with row + low <= key <= row + high into tiles; None is no limit."""
    if low is None or high is None:
        yield from _below(rows, keys, high) if low is None else _above(rows, keys, low)
        return
    # Rows that see any key, few enough at a time that no key meets both edges of the band.
    start, stop = max(rows.start, keys.start - high), min(rows.stop, keys.stop - low)
    width = high - low + 1
    for first in range(start, stop, width) if width > 0 else ():
        some = range(first, min(first + width, stop))
        split = min(max(some.stop + low, keys.start), keys.stop)
        yield from _above(some, range(keys.start, split), low)
        yield from _below(some, range(split, keys.stop), high)


def _below(rows: range, keys: range, high: int | None) -> Iterator[Tile]:
    """The pairs with key <= row + high."""
    if high is None:
        yield from _full(rows, keys)
        return
    first = min(max(rows.start, keys.start - high), rows.stop)  # the first row that sees a key
    last = min(max(first, keys.stop - high), rows.stop)  # rows from here on see all keys
    edge = min(first + high, keys.stop)  # keys before this one are seen from `first` on
    if first == rows.stop:
        return
    yield from _full(range(first, rows.stop), range(keys.start, edge))
    yield from _full(range(last, rows.stop), range(edge, keys.stop))
    if first < last:
        yield Tile(rows=range(first, last), keys=range(edge, edge + last - first), kind="causal")


def _above(rows: range, keys: range, low: int) -> Iterator[Tile]:
    """The pairs with key >= row + low: those below an edge, with rows and keys in reverse order."""
    for tile in _below(_mirrored(rows), _mirrored(keys), -low):
        kind: Kind = "anti" if tile.kind == "causal" else "full"
        yield Tile(rows=_mirrored(tile.rows), keys=_mirrored(tile.keys), kind=kind)


def _mirrored(rows: range) -> range:
    return range(1 - rows.stop, 1 - rows.start)


def _full(rows: range, keys: range) -> Iterator[Tile]:
    if rows and keys:
        yield Tile(rows=rows, keys=keys, kind="full")


@lru_cache(maxsize=64)
def last_hops(
    world_size: int,
    length: int,
    layout: Layout,
    sight: Sight,
    bounds: tuple[tuple[int, int], ...],
) -> tuple[int, ...]:
    """How far the keys of each rank travel: to the last rank after it that sees any of them.

    Args:
        world_size: Ranks of the ring.
        length: Rows of each rank.
        layout: Which rank holds which rows.
        sight: Which keys a query sees.
        bounds: First position of each sequence, and the one after its last.

    Returns:
        For each rank how many times its keys are passed on, 0 to world_size - 1.
    """
    runs = [runs_of(rank, world_size, length, layout) for rank in range(world_size)]

    def is_seen(source: int, hop: int) -> bool:
        queries = runs[(source + hop) % world_size]
        return any(True for b in bounds for _ in tiles_between(queries, runs[source], sight, b))

    return tuple(
        next((hop for hop in range(world_size - 1, 0, -1) if is_seen(source, hop)), 0)
        for source in range(world_size)
    )
