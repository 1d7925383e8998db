"""Checks of what a slide encoder is given: tiles, coordinates and padding, with clear errors.

Shape legend: b slides, n tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .slide_positions import grid_cells

__all__ = ["check_coordinates", "check_padding", "check_slides"]

_COORD_DTYPES = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64),
)
# Below this, a common spacing of more than a tile may well be chance.
_MIN_TILES_FOR_SPACING = 32
# A tile size that is wrong by more than this factor is no slip between levels.
_MAX_SHRINKAGE = 8


def check_slides(
    tiles: Tensor,
    coords: Tensor,
    padding_mask: Tensor | None,
    *,
    tile_size: int,
    input_dim: int,
) -> None:
    """Checks shapes and dtypes of what a slide encoder is given.

    Args:
        tiles: Embeddings of the tiles, (batch, num_tiles, input_dim).
        coords: Pixels (x, y), (batch, num_tiles, 2).
        padding_mask: Bool (batch, num_tiles), True = padding.
        tile_size: Pixels from one tile to the next.
        input_dim: Channels of the tile embeddings.

    Raises:
        ValueError: If a shape does not fit or `tile_size` is below 1.
        TypeError: If a dtype does not fit or `tile_size` is not an integer.
    """
    if type(tile_size) is not int:
        raise TypeError(f"tile_size must be an integer, got {tile_size!r}.")
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1 pixel, got {tile_size}.")
    if not isinstance(tiles, Tensor) or not tiles.is_floating_point():
        raise TypeError(f"tile_embeddings must be a tensor of floating point, got {_kind(tiles)}.")
    if tiles.ndim != 3 or tiles.shape[2] != input_dim or 0 in tiles.shape:
        raise ValueError(
            f"tile_embeddings must be (batch, num_tiles, input_dim) with input_dim={input_dim} and "
            f"at least one tile, got {tuple(tiles.shape)}. For one slide add the batch with "
            "tile_embeddings[None] and coords[None]."
        )
    if not isinstance(coords, Tensor) or coords.dtype not in _COORD_DTYPES:
        raise TypeError(
            "coords must be a tensor of integers, float32 or float64 (half types round pixels), "
            f"got {_kind(coords)}. Convert them with torch.as_tensor(coords)."
        )
    if padding_mask is not None and _kind(padding_mask) != torch.bool:
        raise TypeError(
            f"padding_mask must be a bool tensor, True at padding, got {_kind(padding_mask)}. "
            "Turn a mask of ones at tiles into `mask == 0`."
        )
    expected = tuple(tiles.shape[:2])
    if coords.shape != (*expected, 2):
        raise ValueError(
            f"coords must be (batch, num_tiles, 2), here {(*expected, 2)}, got "
            f"{tuple(coords.shape)}."
        )
    if padding_mask is not None and padding_mask.shape != expected:
        raise ValueError(
            f"padding_mask must be (batch, num_tiles), here {expected}, got "
            f"{tuple(padding_mask.shape)}."
        )


def check_padding(padding_mask: Tensor) -> None:
    """Checks that padding is on the right and leaves each slide a tile.

    Args:
        padding_mask: Bool (batch, num_tiles), True = padding.

    Raises:
        ValueError: If it is not so; the message names slide and tile.
    """
    wrong = (padding_mask[:, :-1] & ~padding_mask[:, 1:]).nonzero()
    if len(wrong):
        slide, tile = wrong[0].tolist()
        raise ValueError(
            f"padding_mask must be right padding, got padding at tile {tile} of slide {slide} "
            f"before tile {tile + 1}, which is none. Move padding to the end, or drop such tiles."
        )
    empty = padding_mask[:, 0].nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"padding_mask must leave each slide at least one tile, got none for slides {empty}. "
            "Leave such slides out of the batch."
        )


def check_coordinates(
    coords: Tensor,
    padding_mask: Tensor | None,
    *,
    tile_size: int,
    grid_size: int,
    check_spacing: bool = True,
) -> None:
    """Checks that coordinates are pixels at level 0, with tiles `tile_size` apart on the grid.

    Args:
        coords: Pixels (x, y), (batch, num_tiles, 2).
        padding_mask: Bool (batch, num_tiles), True = padding, on the right; not looked at.
        tile_size: Pixels from one tile to the next.
        grid_size: Cells along each axis of the grid.
        check_spacing: Whether to check how tiles lie to each other.

    Raises:
        ValueError: If a coordinate is not finite, negative, normalised to [0, 1] or outside the
            grid; for `check_spacing`, if two tiles share a cell, or all tiles lie two or more cells
            apart.
    """
    # One transfer for all checks; float64 is exact for pixels.
    pixels = coords.detach().to("cpu", torch.float64)
    if padding_mask is None:
        is_tile = torch.ones(pixels.shape[:2], dtype=torch.bool)
    else:
        is_tile = ~padding_mask.cpu()
    _check_range(pixels, is_tile, tile_size, grid_size)
    if not check_spacing:
        return
    spacings = _spacings(pixels, is_tile)
    _check_one_tile_per_cell(pixels, is_tile, spacings, tile_size, grid_size)
    _check_spacings(pixels, is_tile, spacings, tile_size)


def _check_range(pixels: Tensor, is_tile: Tensor, tile_size: int, grid_size: int) -> None:
    is_fraction = (pixels != pixels.floor()).any(-1)
    is_normalised_slide = ((pixels <= 1).all(-1) | ~is_tile).all(1, keepdim=True)
    size = grid_size * tile_size
    for is_wrong, rule, cure in (
        (~pixels.isfinite().all(-1), "finite", "Remove such tiles, or mark padding as such."),
        ((pixels < 0).any(-1), "0 or more", "Count pixels from the upper left of the slide."),
        (
            is_fraction & is_normalised_slide,
            "pixels at level 0, not normalised to [0, 1]",
            "Multiply them by the size of the slide.",
        ),
        (
            (pixels >= size).any(-1),
            f"below grid_size * tile_size = {grid_size} * {tile_size} = {size}",
            f"If the tiles are more than {tile_size} pixels apart, pass tile_size; for larger "
            "slides make the model with a larger grid_size, which needs no new weights.",
        ),
    ):
        wrong = (is_wrong & is_tile).nonzero()
        if len(wrong):
            slide, tile = wrong[0].tolist()
            raise ValueError(
                f"coords must be {rule}, got {_show(pixels[slide, tile])} at tile {tile} of slide "
                f"{slide} ({len(wrong)} such tiles). {cure}"
            )


def _check_one_tile_per_cell(
    pixels: Tensor, is_tile: Tensor, spacings: Tensor, tile_size: int, grid_size: int
) -> None:
    cell_x, cell_y = grid_cells(pixels.where(is_tile[..., None], 0.0), tile_size).unbind(-1)
    # Padding gets cells of its own, beyond the grid.
    apart = grid_size**2 + torch.arange(is_tile.shape[1])
    cells = (cell_x * grid_size + cell_y).where(is_tile, apart)
    cells, order = cells.sort(dim=1, stable=True)
    shared = (cells[:, 1:] == cells[:, :-1]).nonzero()
    if not len(shared):
        return
    slide, place = shared[0].tolist()
    first, second = order[slide, place : place + 2].tolist()
    one, other = pixels[slide, first], pixels[slide, second]
    spacing = int(spacings[slide])
    fits = _fits_spacing(pixels[slide][is_tile[slide]], spacing, tile_size, grid_size)
    cure = f"pass tile_size={spacing}, if that is meant" if fits else "pass the right tile_size"
    raise ValueError(
        f"coords must be pixels at level 0 of tiles that are tile_size={tile_size} apart, got "
        f"tiles {first} at {_show(one)} and {second} at {_show(other)} of slide {slide} in one "
        f"cell ({len(shared)} such pairs). Multiply coordinates of another level by its "
        f"downsampling, or {cure}; check_coords=False lets tiles overlap."
    )


def _fits_spacing(tiles: Tensor, spacing: int, tile_size: int, grid_size: int) -> bool:
    """Says whether a smaller tile size is likely, and puts all tiles (n, 2) in cells of their own.

    A tiny common divisor comes from tissue pieces with origins of their own, or from cells that
    were taken for pixels: no tile is that small.
    """
    if not tile_size <= _MAX_SHRINKAGE * spacing < _MAX_SHRINKAGE * tile_size:
        return False
    cells = grid_cells(tiles, spacing)
    return int(cells.max()) < grid_size and len(cells.unique(dim=0)) == len(cells)


def _check_spacings(pixels: Tensor, is_tile: Tensor, spacings: Tensor, tile_size: int) -> None:
    is_wide = (spacings >= 2 * tile_size) & (is_tile.sum(1) >= _MIN_TILES_FOR_SPACING)
    if not is_wide.any():
        return
    slide = int(is_wide.nonzero()[0])
    is_elsewhere = (pixels[slide] != pixels[slide, 0]).any(-1) & is_tile[slide]
    tile = int(is_elsewhere.nonzero()[0])
    spacing = int(spacings[slide])
    raise ValueError(
        f"coords must be pixels at level 0 of tiles that are tile_size={tile_size} apart, got "
        f"multiples of {spacing} between all {int(is_tile[slide].sum())} tiles of slide {slide}, "
        f"such as tile 0 at {_show(pixels[slide, 0])} and tile {tile} at "
        f"{_show(pixels[slide, tile])}. Pass tile_size={spacing} (a 40x slide with tiles of 20x "
        "has twice the usual one); check_coords=False keeps the gaps."
    )


def _spacings(pixels: Tensor, is_tile: Tensor) -> Tensor:
    """Finds the greatest common divisor of all distances from the first tile: int64 (b,)."""
    gaps = (pixels - pixels[:, :1]).abs().where(is_tile[..., None], 0.0)
    gaps = gaps.to(torch.int64).flatten(1)
    while gaps.shape[1] > 1:
        gaps = functional.pad(gaps, (0, gaps.shape[1] % 2))
        gaps = torch.gcd(*gaps.chunk(2, dim=1))
    return gaps[:, 0]


def _kind(value: object) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def _show(point: Tensor) -> str:
    return f"({', '.join(f'{value:.7g}' for value in point.tolist())})"
