"""Places of a plane as positions on one line: the Hilbert curve.

Tokens that are aligned by time are sorted by it. For tokens with a place (row, column) the position
along a curve through the plane does the same: cells that follow each other on the Hilbert curve
(D. Hilbert, 1891) are neighbours in the plane, and each run of 4^k cells that starts at a multiple
of 4^k is a square. So a segment of the attention is a compact area, the same one in all modalities;
by rows it would be a strip as wide as the image, and Morton's curve jumps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import can_read

__all__ = ["hilbert_positions"]

# Cells along each side are 2^16, so positions are exact in float64 with room to spare.
_BITS = 16


def hilbert_positions(places: Tensor, *, cell_size: float) -> Tensor:
    """Computes positions along the Hilbert curve through the cells of a plane.

    All modalities that are to be aligned take the same unit, origin and `cell_size`. Places in one
    cell get the same position.

    Args:
        places: Rows and columns in a common unit, at least 0, (..., 2).
        cell_size: Side of a cell in that unit: the distance below which order does not matter.

    Returns:
        Positions, float64 (...), whole numbers below 4^16.

    Raises:
        ValueError: If shapes do not fit, `cell_size` is not positive, or a place is negative, not
            finite or 65,536 cells or more from the origin.

    Example:
        >>> times = {"tiles": hilbert_positions(torch.tensor([[0, 0], [0, 256]]), cell_size=256)}
    """
    if places.ndim < 1 or places.shape[-1] != 2:
        raise ValueError(
            f"places must be (..., 2), a row and a column each, got {tuple(places.shape)}."
        )
    if not 0.0 < cell_size < float("inf"):
        raise ValueError(f"cell_size must be a positive number, got {cell_size}.")
    cells = torch.floor(places.to(torch.float64) / cell_size)
    if can_read(cells) and cells.numel():
        lowest, highest = cells.min().item(), cells.max().item()
        if not (lowest >= 0 and highest < 2**_BITS):
            raise ValueError(
                f"places must be from 0 to below {2**_BITS} cells of cell_size={cell_size}, got "
                f"cells from {lowest:g} to {highest:g}. Subtract the smallest place, or take "
                "larger cells."
            )
    row, column = cells.to(torch.int64).unbind(-1)
    position = torch.zeros_like(row)
    # From the coarsest quarter to the finest: its number along the curve, then the turn of its own
    # curve, so that it begins where that of the quarter before ends.
    for bit in reversed(range(_BITS)):
        low, right = row >> bit & 1, column >> bit & 1
        position = position * 4 + (3 * right ^ low)
        mirrored = (low == 0) & (right == 1)
        size = (1 << bit) - 1
        row, column = row & size, column & size
        row = torch.where(mirrored, size - row, row)
        column = torch.where(mirrored, size - column, column)
        is_turned = low == 0
        row, column = torch.where(is_turned, column, row), torch.where(is_turned, row, column)
    return position.to(torch.float64)
