"""Options of the slide encoders, and the segment lengths that follow from the size of a slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longnet_zoo.ops.pattern import DilatedPattern

from .checks import check_choices, check_integers, check_positive
from .config import ModelConfig

__all__ = ["GigaPathSlideConfig", "slide_segment_lengths"]

_NUM_BRANCHES = 5
_LOG2_SHORTEST_SEGMENT = 10


def slide_segment_lengths(slide_size: int, tile_size: int) -> tuple[int, ...]:
    """Computes the segment lengths of the published model for slides of a size.

    Five lengths, evenly spaced in their logarithms, from 1,024 to the greatest power of two that is
    no more than the number of tiles of a square slide.

    Args:
        slide_size: Pixels along the side of the largest slide, at level 0.
        tile_size: Pixels along the side of a tile.

    Returns:
        Tokens per segment of each branch.

    Raises:
        ValueError: If such a slide has fewer than 2,048 tiles.

    Example:
        >>> slide_segment_lengths(262_144, 256)
        (1024, 5792, 32768, 185363, 1048576)
    """
    num_tiles = (slide_size // tile_size) ** 2
    span = num_tiles.bit_length() - 1 - _LOG2_SHORTEST_SEGMENT
    if span < 1:
        raise ValueError(
            "segment lengths from 1024 on need a slide_size of at least 2048 tiles, got "
            f"{num_tiles} tiles for {slide_size=} and {tile_size=}. Pass segment_lengths."
        )
    step = span / (_NUM_BRANCHES - 1)
    return tuple(int(2 ** (_LOG2_SHORTEST_SEGMENT + i * step)) for i in range(_NUM_BRANCHES))


@dataclass(frozen=True, kw_only=True)
class GigaPathSlideConfig(ModelConfig):
    """Options of `GigaPathSlideEncoder`, beside those of `ModelConfig`.

    Attributes:
        segment_lengths: Tokens per segment of each branch; None: `slide_segment_lengths` of
            `slide_size` and `tile_size`.
        input_dim: Channels of the tile embeddings.
        slide_size: Pixels along the side of the largest slide, for the segment lengths.
        tile_size: Pixels from one tile to the next at level 0.
        grid_size: Cells along each axis of the grid, a bound for coordinates; no weight depends
            on it.
        pool: The embedding of a slide: its class token ("cls") or the mean of its tiles ("mean").
        num_classes: Outputs of the head, which has a bias; 0: no head.
        norm_eps: Epsilon of the LayerNorm of the embedding.
    """

    num_heads: int = 16
    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    dropout: float = 0.25
    drop_path: float = 0.1
    input_dim: int = 1536
    slide_size: int = 262_144
    tile_size: int = 256
    grid_size: int = 1000
    pool: Literal["cls", "mean"] = "cls"
    num_classes: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_integers(self, "input_dim", "slide_size", "tile_size", "grid_size")
        check_integers(self, "num_classes", minimum=0)
        check_positive(self, "norm_eps")
        check_choices(self, "pool")
        super().__post_init__()
        if self.embed_dim % 4:
            raise ValueError(
                "embed_dim must be a multiple of 4 (sine and cosine of two axes), got "
                f"embed_dim={self.embed_dim}."
            )

    @property
    def pattern(self) -> DilatedPattern:
        """The attention pattern."""
        lengths = self.segment_lengths
        return self._pattern(
            slide_segment_lengths(self.slide_size, self.tile_size) if lengths is None else lengths
        )

    @property
    def usual_seq_len(self) -> int:
        """A typical number of tiles, no more than the longest segment."""
        return min(10_000, self.pattern.segment_lengths[-1])
