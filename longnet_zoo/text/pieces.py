"""Reads a text file in pieces, so that a file larger than memory can be streamed.

Piece k begins behind the first line end at or after byte k * max_bytes, or at the character there
where no line ends soon. So each boundary is found without what comes before, and any piece can be
read by itself.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["read_pieces"]

# How far to look for the end of a line.
_LINE_BYTES = 2**16


def read_pieces(
    path: Path, *, start: int = 0, max_bytes: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yields the pieces of a file from piece `start` on.

    Args:
        path: The file.
        start: First piece, counted from 0.
        max_bytes: Size of a piece, give or take a line; None yields the whole file.

    Yields:
        Number and content of each piece.

    Raises:
        OSError: The file cannot be read.
        ValueError: `max_bytes` is below 1.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be 1 or more, got {max_bytes}.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is None or size <= max_bytes:
            if start == 0:
                yield 0, file.read()
            return
        for piece in range(start, math.ceil(size / max_bytes)):
            first = _boundary(file, piece * max_bytes)
            last = _boundary(file, (piece + 1) * max_bytes)
            file.seek(first)
            yield piece, file.read(last - first)


def _boundary(file: BinaryIO, place: int) -> int:
    """Returns where the piece that is to begin at byte `place` begins."""
    if place == 0:
        return 0
    file.seek(place)
    ahead = file.read(_LINE_BYTES)
    line_end = ahead.find(b"\n")
    if line_end >= 0:
        return place + line_end + 1
    # Bytes 10xxxxxx continue a character of UTF-8, which has at most four bytes.
    starts = (i for i, byte in enumerate(ahead[:4]) if byte & 0xC0 != 0x80)
    return place + next(starts, len(ahead) if len(ahead) < 4 else 0)
