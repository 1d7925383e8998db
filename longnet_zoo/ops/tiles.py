"""Tiles: which rows attend to which, where no strided view can say it.

Rows that have keys in common are gathered into tiles of one size, and tiles of queries are paired
with tiles of keys. In a *full* pair every query sees every key, so that any kernel of plain
attention serves; in the others a query sees the keys up to its limit. What tile a row is in depends
on no later row, so that later rows cannot move its result by a bit.

Shape legend: b batch, n seq_len, h num_heads, t rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .sequences import SequenceGroup

__all__ = ["PairList", "TilePlan", "plan_blocks", "plan_labels"]

_MIN_TILE, _USUAL_TILE, _MAX_TILE, _TILES_PER_LABEL = 8, 32, 256, 8
# Larger than any place: the place of an empty slot, which no query sees.
_NOWHERE = 2**62


@dataclass(frozen=True, kw_only=True)
class PairList:
    """Pairs of tiles: `keys[starts[i] : starts[i] + counts[i]]` are those of query tile i."""

    keys: Tensor
    starts: Tensor
    counts: Tensor

    def by_count(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Query tiles (c,) with equally many key tiles, and these, (c, k)."""
        for count in self.counts.unique().tolist():
            if count:
                queries = (self.counts == count).nonzero().squeeze(1)
                places = torch.arange(count, device=self.keys.device)
                yield queries, self.keys[self.starts[queries, None] + places]

    def by_rank(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Query tiles (c,) with their first key tile, (c, 1), with their second, and so on."""
        for rank in range(int(self.counts.max()) if len(self.counts) else 0):
            queries = (self.counts > rank).nonzero().squeeze(1)
            yield queries, self.keys[self.starts[queries, None] + rank]


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """Attention between tiles of rows.

    Attributes:
        query_rows: The row of each slot in the queries (b * n * h, ...), (tiles, t); b * n * h at
            empty slots.
        key_rows: The same for the keys (b * n * num_kv_heads, ...).
        query_limits: The last place that each query sees, (tiles, t); -1 at empty slots.
        key_places: The place of each key, (tiles, t); beyond all limits at empty slots.
        full: Pairs in which every query sees every key.
        partial: Pairs in which places and limits decide.
    """

    query_rows: Tensor
    key_rows: Tensor
    query_limits: Tensor
    key_places: Tensor
    full: PairList
    partial: PairList


def plan_labels(
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    num_labels: int,
    num_kv_heads: int,
    is_causal: bool,
) -> TilePlan:
    """Plans the branch in which a query sees the keys of its own label.

    Args:
        query_labels: Integers from 0 to `num_labels` - 1, (b, n, h); -1: takes no part.
        key_labels: The same for the keys, by query head, (b, n, h).
        num_labels: Number of labels.
        num_kv_heads: Heads of the keys.
        is_causal: Whether a query sees only the keys up to itself.
    """
    seq_len = query_labels.shape[1]
    # Several tiles to a label, so that few pairs are cut by causality or the end of the label.
    # Large tiles are fast, but mostly empty where labels have few rows: in many packed sequences.
    rows_per_label = seq_len // num_labels
    size = max(_MIN_TILE, min(rows_per_label, _USUAL_TILE))
    size = max(size, min(rows_per_label // _TILES_PER_LABEL, _MAX_TILE))
    size = 2 ** (size.bit_length() - 1)
    queries = _gather_labels(query_labels, num_labels, query_labels.shape[2], size)
    keys = _gather_labels(key_labels, num_labels, num_kv_heads, size)
    limits = queries.places if is_causal else torch.full_like(queries.places, seq_len)
    counts = keys.num_tiles[queries.labels]
    first = (keys.num_tiles.cumsum(0) - keys.num_tiles)[queries.labels]
    return _plan(
        query_rows=queries.rows,
        key_rows=keys.rows,
        query_limits=limits.masked_fill(queries.places == _NOWHERE, -1),
        key_places=keys.places,
        queries=torch.arange(len(counts), device=counts.device).repeat_interleave(counts),
        keys=_ranges(counts) + first.repeat_interleave(counts),
    )


def plan_blocks(
    block_pairs: Tensor,
    block_size: int,
    group: SequenceGroup,
    *,
    shape: tuple[int, int, int, int],
    is_causal: bool,
    is_hidden: Tensor | None,
) -> TilePlan:
    """Plans attention between blocks for sequences of equal length.

    Args:
        block_pairs: Which blocks see which, sorted: numbers of query and key blocks (2, pairs) for
            all heads, or of heads, query and key blocks (3, pairs).
        block_size: Tokens per block.
        group: The sequences.
        shape: (b, n, h, num_kv_heads).
        is_causal: Whether a query sees only the keys up to itself.
        is_hidden: Padding that is not at the end of its row, (b, n), or None.
    """
    _, seq_len, num_heads, num_kv_heads = shape
    device, length = block_pairs.device, group.length
    num_blocks = -(-length // block_size)
    # A block is one tile, or several that are as large as each other; its last one may have gaps.
    parts = -(-min(block_size, length) // _MAX_TILE)
    size = -(-min(block_size, length) // parts)
    blocks = torch.arange(num_blocks, device=device)[:, None]
    slots = torch.arange(parts * size, device=device)
    places = blocks * block_size + slots
    is_empty = (slots >= block_size) | (places >= length)
    places, is_empty = (x.view(-1, size).expand(group.count, 1, -1, -1) for x in (places, is_empty))
    starts = torch.tensor([row * seq_len + first for row, first in group.starts()], device=device)
    tokens = starts[:, None, None, None] + places.where(~is_empty, 0)
    if is_hidden is not None:
        is_empty = is_empty | is_hidden.flatten()[tokens]

    def rows_of(heads: int) -> Tensor:
        rows = tokens * heads + torch.arange(heads, device=device)[:, None, None]
        return rows.masked_fill(is_empty, shape[0] * seq_len * heads).flatten(0, 2)

    limits = places if is_causal else torch.full_like(places, length)
    limits = limits.masked_fill(is_empty, -1).expand(-1, num_heads, -1, -1)
    key_places = places.masked_fill(is_empty, _NOWHERE).expand(-1, num_kv_heads, -1, -1)
    head, query, key = _tile_pairs(block_pairs, parts, num_heads)
    sequences = torch.arange(group.count, device=device)[:, None, None]
    num_tiles = num_blocks * parts
    key_head = head // (num_heads // num_kv_heads)
    queries = ((sequences * num_heads + head) * num_tiles + query).flatten()
    keys = ((sequences * num_kv_heads + key_head) * num_tiles + key).flatten()
    if parts > 1:  # the tiles of a block took turns
        queries, order = queries.sort(stable=True)
        keys = keys[order]
    return _plan(
        query_rows=rows_of(num_heads),
        key_rows=rows_of(num_kv_heads),
        query_limits=limits.flatten(0, 2),
        key_places=key_places.flatten(0, 2),
        queries=queries,
        keys=keys,
    )


def _tile_pairs(block_pairs: Tensor, parts: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads, query tiles and key tiles, for blocks of so many tiles each.

    One row for all pairs, or for pairs that heads share a row for each head.
    """
    device = block_pairs.device
    *heads, query, key = block_pairs.repeat_interleave(parts**2, dim=1)
    part = torch.arange(parts**2, device=device).repeat(block_pairs.shape[1])
    head = heads[0] if heads else torch.arange(num_heads, device=device)[:, None]
    return head, query * parts + part // parts, key * parts + part % parts


@dataclass(frozen=True, kw_only=True)
class _Gathered:
    """Rows by label: `rows` and `places` of the slots, (tiles, t).

    `num_tiles` are the tiles of each label of each head, `labels` the label of each tile.
    """

    rows: Tensor
    places: Tensor
    num_tiles: Tensor
    labels: Tensor


def _gather_labels(labels: Tensor, num_labels: int, num_row_heads: int, size: int) -> _Gathered:
    """Gathers rows of the same label and head, in their order."""
    batch, seq_len, num_heads = labels.shape
    device = labels.device
    lanes = torch.arange(batch * num_heads, device=device).view(batch, num_heads, 1)
    by_lane = labels.transpose(1, 2).long()
    by_lane = torch.where(by_lane < 0, -1, lanes * num_labels + by_lane).flatten()
    by_lane, order = by_lane.sort(stable=True)
    is_kept = by_lane >= 0
    by_lane, order = by_lane[is_kept], order[is_kept]
    counts = torch.bincount(by_lane, minlength=batch * num_heads * num_labels)
    num_tiles = -(-counts // size)
    rank = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[by_lane]
    slots = (num_tiles.cumsum(0) - num_tiles)[by_lane] * size + rank
    lane, place = order // seq_len, order % seq_len
    head = lane % num_heads // (num_heads // num_row_heads)
    total = int(num_tiles.sum())
    rows = torch.full((total * size,), batch * seq_len * num_row_heads, device=device)
    rows[slots] = ((lane // num_heads) * seq_len + place) * num_row_heads + head
    places = torch.full((total * size,), _NOWHERE, device=device)
    places[slots] = place
    return _Gathered(
        rows=rows.view(-1, size),
        places=places.view(-1, size),
        num_tiles=num_tiles,
        labels=torch.arange(len(counts), device=device).repeat_interleave(num_tiles),
    )


def _plan(
    *,
    query_rows: Tensor,
    key_rows: Tensor,
    query_limits: Tensor,
    key_places: Tensor,
    queries: Tensor,
    keys: Tensor,
) -> TilePlan:
    """Sorts pairs, ordered by query tile, into full ones, others, and those that nobody sees."""
    is_empty = query_limits < 0
    lowest = query_limits.masked_fill(is_empty, _NOWHERE).amin(1)
    is_seen = key_places.amin(1)[keys] <= query_limits.amax(1)[queries]
    is_full = is_seen & (key_places.amax(1)[keys] <= lowest[queries])
    return TilePlan(
        query_rows=query_rows,
        key_rows=key_rows,
        query_limits=query_limits,
        key_places=key_places,
        full=_pair_list(queries[is_full], keys[is_full], len(query_rows)),
        partial=_pair_list(queries[is_seen & ~is_full], keys[is_seen & ~is_full], len(query_rows)),
    )


def _pair_list(queries: Tensor, keys: Tensor, num_queries: int) -> PairList:
    counts = torch.bincount(queries, minlength=num_queries)
    return PairList(keys=keys, starts=counts.cumsum(0) - counts, counts=counts)


def _ranges(counts: Tensor) -> Tensor:
    """0, 1, ..., count - 1 for each count, in one row."""
    total = int(counts.sum())
    starts = counts.cumsum(0) - counts
    return torch.arange(total, device=counts.device) - starts.repeat_interleave(counts)
