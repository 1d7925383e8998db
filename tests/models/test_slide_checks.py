"""Inputs that a slide encoder refuses: each message names what is wrong, where, and the cure."""

import re

import pytest
import torch

from longnet_zoo.models.slide_checks import check_coordinates
from tests.models.slides import draw_slides, make_encoder


def grid(columns, rows, spacing=256):
    """Tiles side by side, column by column: (1, columns * rows, 2)."""
    return spacing * torch.cartesian_prod(torch.arange(columns), torch.arange(rows))[None]


def check(coords, mask=None, tile_size=256, grid_size=1000):
    check_coordinates(coords, mask, tile_size=tile_size, grid_size=grid_size)


def with_point(slide, tile, point, slides=2):
    coords = grid(6, 7).repeat(slides, 1, 1).double()
    coords[slide, tile] = torch.tensor(point, dtype=torch.float64)
    return coords


@pytest.mark.parametrize(
    "coords",
    [
        grid(10, 20),
        grid(10, 20).float() + 100.5,  # a grid that starts at the tissue
        grid(1, 1),
        grid(5, 6, 512),  # too few tiles to call a spacing wrong
        grid(1000, 1),
        grid(20, 20)[:, torch.arange(400) % 3 > 0],
        grid(20, 20)[:, ::2] + 3,
        torch.cat([grid(6, 6), 5 * 256 * torch.tensor([[[7, 7]]])], dim=1),
        grid(6, 6, 300),  # gaps between the tiles
    ],
    ids=range(9),
)
def test_coordinates_of_slides_pass(coords):
    check(coords)


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (with_point(1, 5, [float("nan"), 0]), "finite, got (nan, 0) at tile 5 of slide 1 (1 such"),
        (with_point(0, 2, [0, float("inf")]), "finite, got (0, inf) at tile 2 of slide 0"),
        (with_point(1, 3, [256, -512.5]), "0 or more, got (256, -512.5) at tile 3 of slide 1"),
        (
            torch.cat([grid(6, 7).double(), grid(6, 7) / 2000.0]),
            "not normalised to [0, 1], got (0, 0.128) at tile 1 of slide 1 (41 such tiles). Multi",
        ),
        (
            torch.tensor([[[0.25, 0.5]]]),
            "not normalised to [0, 1], got (0.25, 0.5) at tile 0 of slide 0",
        ),
        (
            with_point(1, 41, [256_000, 5]),
            "below grid_size * tile_size = 1000 * 256 = 256000, got (256000, 5) at tile 41 of "
            "slide 1 (1 such tiles). If the tiles are more than 256 pixels apart, pass tile_size",
        ),
        (with_point(0, 4, [0, 1e30]), "got (0, 1e+30) at tile 4 of slide 0"),
        (
            with_point(1, 9, [300, 257]),
            "tiles 8 at (256, 256) and 9 at (300, 257) of slide 1 in one cell (1 such pairs). "
            "Multiply coordinates of another level by its downsampling, or pass the right tile_",
        ),
        (
            grid(6, 7, 64),
            "tile_size=256 apart, got tiles 0 at (0, 0) and 1 at (0, 64) of slide 0 in one cell "
            "(38 such pairs). Multiply coordinates of another level by its downsampling, or pass "
            "tile_size=64, if that is meant; check_coords=False lets tiles overlap.",
        ),
        (
            grid(6, 7, 1),  # cells rather than pixels
            "(0, 0) and 1 at (0, 1) of slide 0 in one cell (41 such pairs). Multiply coordinates "
            "of another level by its downsampling, or pass the right tile_size; check_"
            "coords=False lets tiles overlap",
        ),
        (
            torch.full((1, 2, 2), 7),
            "tiles 0 at (7, 7) and 1 at (7, 7) of slide 0 in one cell (1 such pairs). Multiply "
            "coordinates of another level by its downsampling, or pass the right tile_size",
        ),
        (
            torch.cat([grid(6, 7), grid(6, 7, 512) + 100]),
            "tile_size=256 apart, got multiples of 512 between all 42 tiles of slide 1, such as "
            "tile 0 at (100, 100) and tile 1 at (100, 612). Pass tile_size=512",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_coordinates_that_are_no_pixels_of_tiles_are_refused(coords, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(coords)


def test_suggested_tile_sizes_pass():
    check(grid(6, 7, 64), tile_size=64)
    check(grid(6, 7, 512) + 100, tile_size=512)
    # Two pieces of tissue with origins of their own: tiles overlap, 4 pixels are no tile.
    pieces = torch.cat([grid(6, 7), grid(6, 7) + torch.tensor([100, 44])], dim=1)
    with pytest.raises(ValueError, match="the right tile_size; check_coords=False lets"):
        check(pieces)
    # A spacing that would put tiles beyond the grid is not suggested.
    coords = torch.cat([grid(6, 7, 2), torch.tensor([[[200_000, 0]]])], dim=1)
    with pytest.raises(ValueError, match="pass the right tile_size"):
        check(coords)


def test_padding_is_not_looked_at():
    coords, mask = grid(6, 7, 256).double().repeat(2, 1, 1), torch.zeros(2, 42, dtype=torch.bool)
    coords[1, 30:], mask[1, 30:] = torch.nan, True
    check(coords, mask)
    coords[1, 30:] = -1.0
    check(coords, mask)
    coords[1, 30:] = 0.5
    check(coords, mask)
    coords[1, 30:] = 1e9
    check(coords, mask)
    coords[1, :30] /= 2000
    with pytest.raises(ValueError, match=r"not normalised to .* of slide 1 \(29 such tiles\)"):
        check(coords, mask)
    coords[1, :30] *= 2000
    # 30 tiles are too few to call a spacing wrong; so are 42 with 12 of padding.
    check(2 * coords[1:], mask[1:])
    with pytest.raises(ValueError, match="all 42 tiles of slide 0"):
        check(2 * coords, mask)


TILES, COORDS = draw_slides()
MASK = torch.zeros(2, 43, dtype=torch.bool)


def masked(*places):
    mask = MASK.clone()
    for place in places:
        mask[place] = True
    return mask


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((TILES.tolist(), COORDS), TypeError, "tile_embeddings .* floating point, got list"),
        ((TILES.long(), COORDS), TypeError, r"floating point, got torch\.int64"),
        ((TILES[0], COORDS[0]), ValueError, r"got \(43, 10\)\. For one slide .*tile_emb.*\[None\]"),
        ((TILES[..., :9], COORDS), ValueError, r"input_dim=10 .* got \(2, 43, 9\)"),
        ((TILES[:, :0], COORDS[:, :0]), ValueError, r"at least one tile, got \(2, 0, 10\)"),
        ((TILES, COORDS.numpy()), TypeError, "coords must be a tensor .*, got ndarray"),
        ((TILES, COORDS.half()), TypeError, r"half types round pixels\), got torch\.float16"),
        ((TILES, COORDS > 0), TypeError, r"coords .* got torch\.bool"),
        ((TILES, COORDS[:, :5]), ValueError, r"here \(2, 43, 2\), got \(2, 5, 2\)"),
        ((TILES, COORDS[..., 0]), ValueError, r"here \(2, 43, 2\), got \(2, 43\)"),
        ((TILES, COORDS, MASK.long()), TypeError, r"bool tensor, .* got torch\.int64.*mask == 0"),
        ((TILES, COORDS, [True]), TypeError, "padding_mask must be a bool tensor, .* got list"),
        ((TILES, COORDS, MASK[:1]), ValueError, r"here \(2, 43\), got \(1, 43\)"),
        (
            (TILES, COORDS, masked((1, slice(5, 7)))),
            ValueError,
            "padding at tile 6 of slide 1 before tile 7",
        ),
        ((TILES, COORDS, masked(1)), ValueError, r"got none for slides \[1\]"),
    ],
)
def test_bad_inputs_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make_encoder()(*arguments)


@pytest.mark.parametrize(
    ("tile_size", "error", "message"),
    [
        (0, ValueError, "tile_size must be at least 1 pixel, got 0"),
        (256.0, TypeError, r"tile_size must be an integer, got 256\.0"),
        (True, TypeError, "tile_size must be an integer, got True"),
    ],
)
def test_bad_tile_size_is_refused(tile_size, error, message):
    with pytest.raises(error, match=message):
        make_encoder()(TILES, COORDS, tile_size=tile_size)
