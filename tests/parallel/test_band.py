"""Tiles cover each visible pair once, and keys travel no further than they are seen."""

from itertools import product

import pytest

from longnet_zoo.parallel.band import Sight, Tile, cut_band, last_hops, tiles_between
from longnet_zoo.parallel.layout import Run, runs_of

LAYOUTS = ("contiguous", "striped", "zigzag")


def pairs(tile: Tile) -> list[tuple[int, int]]:
    """The pairs of a tile, as a kernel understands it."""
    if tile.kind != "full":
        assert len(tile.rows) == len(tile.keys)
    seen = {
        "full": lambda i, j: True,
        "causal": lambda i, j: j <= i,
        "anti": lambda i, j: j >= i,
    }[tile.kind]
    return [
        (row, key)
        for (i, row), (j, key) in product(enumerate(tile.rows), enumerate(tile.keys))
        if seen(i, j)
    ]


def test_tiles_of_a_band_cover_each_visible_pair_once():
    limits = (None, *range(-5, 6))
    for num_rows, num_keys, low, high in product(range(1, 6), range(1, 6), limits, limits):
        found = [
            pair for t in cut_band(range(num_rows), range(num_keys), low, high) for pair in pairs(t)
        ]
        expected = [
            (a, c)
            for a, c in product(range(num_rows), range(num_keys))
            if (low is None or a + low <= c) and (high is None or c <= a + high)
        ]
        assert sorted(found) == expected, (num_rows, num_keys, low, high)


def test_no_tile_is_empty():
    for num_rows, num_keys, low, high in product((1, 3, 4), (1, 2, 5), range(-4, 3), range(-3, 4)):
        for tile in cut_band(range(num_rows), range(num_keys), low, high):
            assert tile.rows
            assert tile.keys


def test_a_wide_band_needs_few_tiles():
    # 1000 rows, 100 keys each: both edges and what lies between, for ten groups of rows.
    assert len(list(cut_band(range(1000), range(1000), -99, 0))) <= 30
    assert len(list(cut_band(range(1000), range(1000), None, 0))) == 1
    assert len(list(cut_band(range(1000), range(1000), None, None))) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_between_ranks_are_the_visible_pairs_of_positions(layout):
    sights = [Sight(is_causal=False)]
    sights += [Sight(is_causal=True, max_lookback=x) for x in (None, 1, 2, 3, 5, 8, 100)]
    num_tiles = 0
    for world_size, length in product((1, 2, 3), (2, 4, 6)):
        total = world_size * length
        bounds = {(0, total), (0, total - 1), (1, total // 2), (total // 2, total), (1, 1)}
        ranks = [runs_of(rank, world_size, length, layout) for rank in range(world_size)]
        for queries, keys, sight, (start, stop) in product(ranks, ranks, sights, bounds):
            positions = [[p for run in x for p in run_positions(run)] for x in (queries, keys)]
            found = []
            for tile in tiles_between(queries, keys, sight, (start, stop)):
                num_tiles += 1
                found += pairs(tile)
                first = positions[1][tile.keys.start] - positions[0][tile.rows.start]
                assert tile.key_offset == first
                for rows, of in ((tile.rows, positions[0]), (tile.keys, positions[1])):
                    steps = {of[row + 1] - of[row] for row in rows[:-1]}
                    assert steps <= {tile.row_step}
            lookback = sight.max_lookback or total
            expected = [
                (row, key)
                for (row, i), (key, j) in product(*map(enumerate, positions))
                if start <= i < stop
                and start <= j < stop
                and (not sight.is_causal or (i - lookback < j <= i))
            ]
            assert sorted(found) == expected
    assert num_tiles > 1000


def run_positions(run: Run) -> range:
    return range(run.start, run.stop, run.step)


def hops(world_size, length, *, layout="contiguous", bounds=None, **sight):
    bounds = ((0, world_size * length),) if bounds is None else bounds
    return last_hops(world_size, length, layout, Sight(**sight), bounds)


def test_keys_travel_as_far_as_they_are_seen():
    assert hops(4, 10, is_causal=False) == (3, 3, 3, 3)
    assert hops(4, 10, is_causal=True) == (3, 2, 1, 0)
    assert hops(4, 10, is_causal=True, layout="striped") == (3, 3, 3, 3)
    assert hops(4, 10, is_causal=True, layout="zigzag") == (3, 3, 3, 3)


def test_a_short_look_back_needs_few_hops():
    # The first query of a rank sees max_lookback - 1 keys of the ranks before it.
    for lookback, expected in ((1, 0), (2, 1), (11, 1), (12, 2), (21, 2), (22, 3), (99, 3)):
        farthest = max(hops(8, 10, is_causal=True, max_lookback=lookback)[:4])
        assert farthest == expected if lookback < 99 else farthest == 7
    assert hops(4, 10, is_causal=True, max_lookback=2) == (1, 1, 1, 0)


def test_packed_sequences_that_fit_a_rank_travel_nowhere():
    assert hops(3, 10, is_causal=False, bounds=((0, 10), (10, 20), (20, 30))) == (0, 0, 0)
    assert hops(3, 10, is_causal=False, bounds=((0, 5), (5, 15), (15, 30))) == (1, 2, 2)
