"""Positions of the tiles of a whole slide: pixel coordinates, grid cells, sin-cos embeddings.

A tile whose upper left corner is at pixel (x, y) of level 0 lies in the grid cell
(floor(x / tile_size), floor(y / tile_size)). Its embedding is the fixed 2-D sin-cos code of masked
autoencoders (arXiv 2111.06377): one half of the channels encodes the row cell_y, the other the
column cell_x, and each half holds the sines, then the cosines, of cell / 10000^(4i / embed_dim).

Shape legend: b slides, n tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longnet_zoo.ops.positions import float64_device

__all__ = ["grid_cells", "sincos_positions"]


def grid_cells(coords: Tensor, tile_size: int) -> Tensor:
    """Computes the grid cells of tiles, exact for integers and for floats that hold integers.

    Args:
        coords: Pixels (x, y) at level 0, (..., 2), integers or floats.
        tile_size: Pixels from one tile to the next.

    Returns:
        Cells (cell_x, cell_y), int64 (..., 2).
    """
    pixels = coords.floor() if coords.is_floating_point() else coords
    return pixels.to(torch.int64).div(tile_size, rounding_mode="floor")


def sincos_positions(cells: Tensor, embed_dim: int, *, grid_size: int) -> Tensor:
    """Computes the embeddings of grid cells.

    A table of one axis, (grid_size, embed_dim / 2), serves both; none of the grid ever exists.
    Angles are float64, whatever the dtype of a model.

    Args:
        cells: Cells (cell_x, cell_y) in [0, grid_size), int64 (..., 2).
        embed_dim: Channels, a multiple of 4.
        grid_size: Cells along each axis.

    Returns:
        Embeddings, float32 (..., embed_dim), on the device of `cells`.
    """
    work_device = float64_device(cells.device)
    exponents = torch.arange(embed_dim // 4, device=work_device, dtype=torch.float64)
    frequencies = 10000.0 ** (-4.0 * exponents / embed_dim)
    axis = torch.arange(grid_size, device=work_device, dtype=torch.float64)
    angles = axis[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1).float().to(cells.device)
    return functional.embedding(cells.flip(-1), table).flatten(-2)
