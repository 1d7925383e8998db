"""Attention between tiles, merged into a softmax that other branches share.

The forward merges a branch into what others found, in place. The backward gets the merged out and
LSE, as the blocks of `joint_softmax.py` do, so that the gradients are exact, mixing included.

Shape legend: b batch, n seq_len, h heads, d head_dim, m rows (b * n * h), t rows of a tile, c tiles
of a call, k key tiles of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .kernels.call import BlockOptions
from .masked_tiles import TiledRows, attend_masked, differentiate_masked, picked
from .merge import merge_
from .tiles import TilePlan

__all__ = ["TiledSoftmax"]

# Key rows that one call gathers, and logits of one call in plain products: both bound the memory
# beside the tiles. A GPU needs large calls to be busy.
_CPU_ROWS_PER_CALL, _CPU_LOGITS_PER_CALL = 2**14, 2**18
_GPU_ROWS_PER_CALL, _GPU_LOGITS_PER_CALL = 2**19, 2**25


@dataclass(frozen=True, kw_only=True)
class TiledSoftmax:
    """One branch of tiles.

    Attributes:
        plan: Which tiles attend to which.
        kernel: The block primitive for full pairs, a module of `ops.kernels`.
        scale: Factor on the dot products.
    """

    plan: TilePlan
    kernel: ModuleType
    scale: float

    def merge_into(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Adds the branch to out (m + 1, d) and lse (m + 1,); the last row is anybody's."""
        rows = self.plan.query_rows
        q, k, v = self._query_tiles(q), self._key_tiles(k), self._key_tiles(v)
        joint_out, joint_lse = _gathered(out, rows), _gathered(lse, rows)
        for queries, keys, is_full in self._calls():
            call = picked(q, queries), picked(k, keys), picked(v, keys)
            if is_full:
                found = self.kernel.forward(*(x.unsqueeze(2) for x in call), self._options)
                new_out, new_lse = (x.squeeze(2) for x in found)
            else:
                new_out, new_lse = attend_masked(*call, **self._bounds(queries, keys))
            parts = picked(joint_out, queries), picked(joint_lse, queries)
            merge_(*parts, new_out, new_lse)
            joint_out.index_copy_(0, queries, parts[0])
            joint_lse.index_copy_(0, queries, parts[1])
        out.index_copy_(0, rows.flatten(), joint_out.flatten(0, 1))
        lse.index_copy_(0, rows.flatten(), joint_lse.flatten())

    def add_gradients(self, grads: tuple[Tensor, ...], rows: TiledRows) -> None:
        """Adds the branch's part to the gradients of q, k and v, each (its rows + 1, d)."""
        # A row that saw nothing has no weights: exp(logits - inf) = 0.
        lse = rows.lse.masked_fill(rows.lse == float("-inf"), float("inf"))
        rows = TiledRows(
            out_grad=self._query_tiles(rows.out_grad),
            q=self._query_tiles(rows.q),
            k=self._key_tiles(rows.k),
            v=self._key_tiles(rows.v),
            out=self._query_tiles(rows.out),
            lse=self._query_tiles(lse, fill=float("inf")),
            lse_grad=None if rows.lse_grad is None else self._query_tiles(rows.lse_grad),
        )
        sums = [torch.zeros_like(x, dtype=lse.dtype) for x in rows[1:4]]
        for queries, keys, is_full in self._calls():
            call = rows.of_call(queries, keys)
            if is_full:
                views = [None if x is None else x.unsqueeze(2) for x in call]
                found = self.kernel.backward(*views[:6], self._options, views[6])
                found = [grad.squeeze(2) for grad in found]
            else:
                found = differentiate_masked(call, **self._bounds(queries, keys))
            for total, index, grad in zip(sums, (queries, keys, keys), found, strict=True):
                tiles = grad.to(total.dtype).reshape(-1, *total.shape[1:])
                total.index_add_(0, index.flatten(), tiles)
        plan = self.plan
        slots = plan.query_rows, plan.key_rows, plan.key_rows
        for total, index, tiles in zip(grads, slots, sums, strict=True):
            total.index_add_(0, index.flatten(), tiles.flatten(0, 1))

    @property
    def _options(self) -> BlockOptions:
        return BlockOptions(scale=self.scale, is_causal=False)

    def _query_tiles(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Gathers rows (m, ...) of queries into tiles (tiles, t, ...)."""
        return _gathered(x, self.plan.query_rows, fill)

    def _key_tiles(self, x: Tensor) -> Tensor:
        return _gathered(x, self.plan.key_rows)

    def _calls(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Lists query tiles (c,), their key tiles (c, k), and whether they see them in full.

        Pairs that are not full go one by one, so that no shape depends on what later rows see.
        """
        tile_size, is_cpu = self.plan.key_rows.shape[1], self.plan.key_rows.device.type == "cpu"
        max_rows = _CPU_ROWS_PER_CALL if is_cpu else _GPU_ROWS_PER_CALL
        max_logits = _CPU_LOGITS_PER_CALL if is_cpu else _GPU_LOGITS_PER_CALL
        for queries, keys in self.plan.full.by_count():
            size = max(1, max_rows // (keys.shape[1] * tile_size))
            for part in zip(queries.split(size), keys.split(size), strict=True):
                yield *part, True
        size = max(1, max_logits // tile_size**2)
        for queries, keys in self.plan.partial.by_rank():
            for part in zip(queries.split(size), keys.split(size), strict=True):
                yield *part, False

    def _bounds(self, queries: Tensor, keys: Tensor) -> dict[str, Any]:
        """What decides over pairs of a call that is not full."""
        limits, places = self.plan.query_limits, self.plan.key_places
        bounds = {"limits": picked(limits, queries), "places": picked(places, keys)}
        return {**bounds, "scale": self.scale}


def _gathered(x: Tensor, rows: Tensor, fill: float = 0.0) -> Tensor:
    """Rows (m, ...) in tiles (tiles, t, ...); a row beyond them gives `fill`."""
    flat = rows.flatten()
    tiles = x.index_select(0, flat.clamp_max(len(x) - 1))
    tiles.index_fill_(0, (flat == len(x)).nonzero().squeeze(1), fill)
    return tiles.unflatten(0, rows.shape)
