"""Keys and values that later queries of a stream can still reach, and one more query against them.

A causal query sees keys of its own segment only, so a branch keeps those of its current segment: in
each head the places that the head takes part in, at most segment_length / dilation_rate of them. A
new segment writes over the last one.

xPos: kept keys have their factor already, counted from a fixed place of the segment, and a query
gets the inverse: only the difference of both enters a logit.

Shape legend: b batch, n new tokens, h heads, g key heads, u heads that attend, t kept rows,
d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from .merge import merge_
from .pattern import DilatedPattern
from .positions import float64_device, xpos_factors, xpos_reach

__all__ = ["KeptKeys"]

# Rows that are set aside at once, so that short streams need little memory.
_ROWS_PER_STEP = 256
_ALL = slice(None)
Rows = slice | list[int]


class KeptKeys:
    """What one branch of one attention layer keeps.

    Args:
        pattern: The schedule.
        branch: Which branch of it.
        q: Queries of the layer, for their shape: (batch, seq_len, num_heads, head_dim).
        k: Its keys, for their shape, dtype and device: (batch, seq_len, num_kv_heads, head_dim).
        batch_size: Rows of the batch.
        xpos_scale_base: Base of the xPos decay, or None.
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        branch: int,
        q: Tensor,
        k: Tensor,
        *,
        batch_size: int,
        xpos_scale_base: float | None,
    ) -> None:
        self.segment_length, self.rate = pattern.branches[branch]
        self.xpos_scale_base = xpos_scale_base
        num_heads, group_size = q.shape[2], q.shape[2] // k.shape[2]
        self._offsets = offsets = pattern.offsets(branch, num_heads)
        self._heads = {offset: _progression(offsets, offset) for offset in set(offsets)}
        groups = [offsets[i : i + group_size] for i in range(0, num_heads, group_size)]
        # Query heads of a key head that take part at different places need keys of their own.
        self._heads_per_key = group_size if all(len(set(x)) == 1 for x in groups) else 1
        self._copies = group_size // self._heads_per_key
        shape = (batch_size, num_heads // self._heads_per_key, 0, k.shape[3])
        with _plain_tensors():
            self.k, self.v = k.new_zeros(shape), k.new_zeros(shape)
        self._middle = 0.0
        if xpos_scale_base is not None:
            reach = xpos_reach(scale_base=xpos_scale_base, is_causal=True, dtype=k.dtype)
            self._middle = min(self.segment_length, reach) / 2

    def append(self, rows: Rows, k: Tensor, v: Tensor, start: int) -> None:
        """Keeps what later queries can reach of tokens that follow each other.

        Args:
            rows: Rows of the batch that the tokens belong to.
            k: Keys, (b, n, g, d), b as many as `rows`.
            v: Values, like k.
            start: Position of the first token.
        """
        stop = start + k.shape[1]
        segment_start = stop - stop % self.segment_length
        first = max(start, segment_start) - segment_start
        for offset, heads in self._heads.items():
            places = range(first + (offset - first) % self.rate, stop - segment_start, self.rate)
            if places:
                columns = slice(segment_start + places[0] - start, None, self.rate)
                self._write(rows, heads, places[0] // self.rate, k[:, columns], v[:, columns])

    def kept(self, rows: Rows, heads: slice, num_rows: int) -> tuple[Tensor, Tensor]:
        """Returns the first keys and values of the segment for query heads, (b, t, u, d)."""
        numbers = range(len(self._offsets))[heads]
        size = self._heads_per_key
        first = numbers[0] // size
        stored = heads if size == 1 else slice(first, numbers[-1] // size + 1)
        found = [x[rows, stored, :num_rows].transpose(1, 2) for x in (self.k, self.v)]
        if size > 1:
            shared = [number // size - first for number in numbers]
            is_one = shared[-1] == 0
            found = [
                x.expand(-1, -1, len(shared), -1) if is_one else x[:, :, shared] for x in found
            ]
        return found[0], found[1]

    def join_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        rows: list[int],
        positions: Sequence[int],
        scale: float,
        bias: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Keeps one more token of some rows of the batch and attends from it.

        Args:
            q: Queries, (b, h, d).
            k: Keys, (b, g, d).
            v: Values, like k.
            out: Result of the branches so far, (b, h, d), float32 or float64; joined in place.
            lse: Its LSE, (b, h).
            rows: Rows of the batch.
            positions: Position of the token of each.
            scale: Factor on the dot products.
            bias: Logits (h, m) by distances (m,), or None.
        """
        places = [position % self.segment_length for position in positions]
        alike = {place: [i for i, x in enumerate(places) if x == place] for place in places}
        for place, own in alike.items():
            heads = self._heads.get(place % self.rate)
            if heads is not None:
                own_rows = self._indices([rows[i] for i in own])
                taken = _ALL if len(alike) == 1 else own
                new = (x[taken].unsqueeze(1) for x in (k, v))
                self._write(own_rows, heads, place // self.rate, *new)
        if len(alike) > 1:
            is_reached = self._reached(places, q.device)
            self._join(q, out, lse, rows, places, _ALL, is_reached, scale, bias)
        elif (found := self._heads.get(places[0] % self.rate)) is not None:
            self._join(q, out, lse, rows, places[:1], found, None, scale, bias)

    def reorder(self, rows: Tensor) -> None:
        """Takes these rows of the batch, which may repeat."""
        with _plain_tensors():
            self.k, self.v = self.k[rows], self.v[rows]

    def xpos_factors(self, first: int, like: Tensor) -> Tensor:
        """Makes the factors of queries at the rows from `first` on: (t, 1, d) for (b, t, u, d)."""
        assert self.xpos_scale_base is not None
        make = _factors_of_step if like.shape[1] == 1 else _factors
        return make(
            first,
            like.shape[1],
            rate=self.rate,
            middle=self._middle,
            scale_base=self.xpos_scale_base,
            head_dim=like.shape[-1],
            dtype=torch.promote_types(like.dtype, torch.float32),
            device=like.device,
        )

    def _write(self, rows: Rows, heads: slice, first: int, k: Tensor, v: Tensor) -> None:
        """Writes keys and values (b, t, g, d) of query heads to the kept rows from `first` on."""
        stop = first + k.shape[1]
        self._reserve(stop)
        sources: slice | list[int] = self._stored(heads)
        if self._copies > 1:
            sources = [head // self._copies for head in range(len(self._offsets))[heads]]
        k, v = k[:, :, sources], v[:, :, sources]
        if self.xpos_scale_base is not None:
            k = (k / self.xpos_factors(first, k)).to(k.dtype)
        own = slice(first, stop)
        self.k[rows, self._stored(heads), own] = k.transpose(1, 2)
        self.v[rows, self._stored(heads), own] = v.transpose(1, 2)

    def _join(
        self,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        rows: list[int],
        places: list[int],
        heads: slice,
        is_reached: Tensor | None,
        scale: float,
        bias: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Attends from places of the segment, one if it is that of all rows."""
        num_rows = max(places) // self.rate + 1
        dtype = out.dtype
        q = q[:, heads].to(dtype)
        if self.xpos_scale_base is not None:
            q = q * torch.cat([self.xpos_factors(x // self.rate, q[:1, None]) for x in places])
        reached = (self._indices(rows), self._stored(heads), slice(0, num_rows))
        k, v = (x[reached].to(dtype) for x in (self.k, self.v))
        grouped = q.unflatten(1, (k.shape[1], -1))
        logits = (grouped @ k.mT).flatten(1, 2) * scale
        if bias is not None:
            logits = logits + self._bias(bias, places, num_rows, q.device)[:, heads].to(dtype)
        if is_reached is not None:
            logits = logits.masked_fill(~is_reached[:, :, :num_rows], float("-inf"))
            # A weight of zero would not silence a NaN of an earlier segment.
            v = v.masked_fill(~is_reached[:, :, :num_rows].any(1)[:, None, :, None], 0.0)
        new_lse = logits.logsumexp(-1)
        weights = torch.exp(logits - new_lse.nan_to_num(neginf=float("inf")).unsqueeze(-1))
        new_out = (weights.unflatten(1, (k.shape[1], -1)) @ v).flatten(1, 2)
        if is_reached is not None:
            new_out = new_out.masked_fill(new_lse.isneginf().unsqueeze(-1), 0.0)
        merge_(out[:, heads], lse[:, heads], new_out, new_lse)

    def _bias(
        self,
        bias: Callable[[Tensor], Tensor],
        places: list[int],
        num_rows: int,
        device: torch.device,
    ) -> Tensor:
        """Evaluates the bias of each query and kept row: (1 or b, h, t)."""
        current = torch.tensor([place // self.rate for place in places], device=device)
        distances = (torch.arange(num_rows, device=device) - current[:, None]) * self.rate
        logits = bias(distances.flatten())
        return logits.unflatten(1, distances.shape).transpose(0, 1)

    def _reached(self, places: list[int], device: torch.device) -> Tensor:
        """Whether each row's token sees a kept row, in each head: (b, h, t)."""
        place = torch.tensor(places, device=device)[:, None]
        offsets = torch.tensor(self._offsets, device=device)
        kept_rows = torch.arange(self.k.shape[2], device=device)
        takes_part = place % self.rate == offsets
        return takes_part[..., None] & (kept_rows <= (place // self.rate)[..., None])

    def _indices(self, rows: list[int]) -> Rows:
        """Rows of the batch as an index, which copies nothing where it is all of them."""
        return _ALL if len(rows) == len(self.k) else rows

    def _stored(self, heads: slice) -> slice:
        """Where the keys of query heads are kept."""
        size = self._heads_per_key
        if size == 1 or heads == _ALL:
            return heads
        return slice(heads.start // size, -(-heads.stop // size))

    def _reserve(self, num_rows: int) -> None:
        have = self.k.shape[2]
        if num_rows <= have:
            return
        most = -(-self.segment_length // self.rate)
        wanted = max(num_rows, 2 * have)
        new = min(most, wanted + -wanted % _ROWS_PER_STEP)
        with _plain_tensors():
            self.k, self.v = (
                torch.cat([x, x.new_zeros(*x.shape[:2], new - have, x.shape[3])], dim=2)
                for x in (self.k, self.v)
            )


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Makes tensors that can be written to both in inference mode and without."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _factors(
    first: int,
    num_rows: int,
    *,
    rate: int,
    middle: float,
    scale_base: float,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    work_device = float64_device(device)
    rows = torch.arange(first, first + num_rows, dtype=torch.float64, device=work_device)
    factors = xpos_factors(
        rows * rate - middle, head_dim=head_dim, scale_base=scale_base, dtype=dtype
    )
    return factors.unsqueeze(1).to(device)


# All layers ask for the same ones; those of many rows would fill the memory.
_factors_of_step = lru_cache(maxsize=64)(_factors)


def _progression(offsets: Sequence[int], offset: int) -> slice:
    """The heads with an offset: every so many, or neighbours."""
    heads = [head for head, own in enumerate(offsets) if own == offset]
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    return slice(heads[0], heads[-1] + 1, step)
