"""Tile shapes of the Triton kernels: a short list for each kernel, timed once, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import triton

__all__ = ["TILES", "Kernel", "Tile", "autotuned", "sort_of", "tiles_for"]

Kernel = Literal["forward", "query_gradient", "key_gradients"]
Tile = tuple[int, int, int, int]

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by kernel and by the largest head_dim they are for.
TILES: dict[Kernel, dict[int, list[Tile]]] = {
    "forward": {
        64: [(128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)],
        256: [(64, 32, 8, 2), (64, 64, 8, 2)],
    },
    "query_gradient": {
        64: [(128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2)],
        256: [(32, 32, 4, 1), (32, 64, 8, 1)],
    },
    "key_gradients": {
        64: [(64, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
        128: [(64, 64, 8, 2), (64, 128, 8, 2)],
        256: [(32, 32, 8, 1), (64, 32, 8, 1)],
    },
}
# float32 products are three of tensor cores each: what counts is that little is spilled.
_FLOAT32_TILES: dict[int, list[Tile]] = {
    64: [(32, 32, 4, 2)],
    128: [(32, 32, 4, 1)],
    256: [(16, 32, 8, 1), (16, 16, 4, 1)],  # the second one for less than 100 KiB shared memory
}
_INTERPRETED = (32, 32, 4, 1)
# Beyond them a segment has so many tiles that their number does not matter.
_MANY_ROWS = 2048


def tiles_for(kernel: Kernel, head_dim: int, *, is_float32: bool) -> list[Tile]:
    """Lists the tile shapes that are tried for a head_dim, best guess first."""
    size = min(bound for bound in TILES[kernel] if head_dim <= bound)
    return _FLOAT32_TILES[size] if is_float32 else TILES[kernel][size]


def autotuned(kernel: Kernel) -> Callable[[Any], Any]:
    """Decorates a kernel so that its first call of a sort times the tile shapes it may have.

    The kernel's parameter `SORT` is text by which calls share a choice: see `sort_of`.
    """
    lists = [*TILES[kernel].values(), *_FLOAT32_TILES.values()]
    shapes = sorted({shape for shapes in lists for shape in shapes})
    if triton.knobs.runtime.interpret:  # nothing to time, and small tiles show more borders
        shapes = [_INTERPRETED]

    def prune(configs: list[Any], named_args: dict[str, Any], **options: Any) -> list[Any]:
        compiled = {**named_args, **options}["kind"]
        is_float32 = compiled.precision.value == "tf32x3"
        allowed = tiles_for(kernel, compiled.head_dim.value, is_float32=is_float32)
        kept = [config for config in configs if _shape(config) in allowed]
        return kept or configs

    return triton.autotune(
        configs=[
            triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
            for m, n, warps, stages in shapes
        ],
        key=["SORT"],  # text, since the choice is written to disk as JSON
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )


def sort_of(kind: Any, rows: int) -> str:
    """Names calls that share a tile shape: those of a kind with segments of similarly many rows."""
    fields = [str(field.value) for field in kind]
    return " ".join([*fields, str(min(_MANY_ROWS, triton.next_power_of_2(rows)))])


def _shape(config: Any) -> Tile:
    blocks = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    return *blocks, config.num_warps, config.num_stages
