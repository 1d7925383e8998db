"""One softmax over keys that come round the ring: which rank has what when, and what it computes.

Each round, a rank attends to the keys that it has while it sends them on and receives the next;
results join by their LSE. In the backward pass the gradients of the keys follow them, a round
later, and come home from the last rank that sees the keys. They are added in at least float32.

Shape legend: b batch, c rows of a rank, h heads, g key heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_zoo.ops.kernels.bias import LogitBias
from longnet_zoo.ops.kernels.call import BlockOptions, Dropout
from longnet_zoo.ops.merge import merge_

from .band import Sight, Tile, last_hops, tiles_between
from .layout import Layout, runs_of

__all__ = ["Ring", "RingSoftmax", "Span"]


class Span(NamedTuple):
    """Neighbouring rows of the batch whose sequences lie between the same positions."""

    first: int
    stop: int
    bounds: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Who has whose keys when: those of rank s reach rank s + hop after `hop` rounds.

    Attributes:
        group: The ranks; None for one process by itself.
        last_hops: For each rank how many times its keys are passed on.
    """

    group: dist.ProcessGroup | None
    last_hops: tuple[int, ...]

    @cached_property
    def rank(self) -> int:
        """This process's place in the ring."""
        return 0 if self.group is None else self.group.rank()

    @property
    def num_hops(self) -> int:
        """Rounds after which no keys travel any more."""
        return max(self.last_hops)

    def at(self, hop: int) -> int:
        """The rank that many places further."""
        return (self.rank + hop) % len(self.last_hops)

    def source(self, hop: int) -> int | None:
        """Whose keys are here after some rounds; None if none are."""
        source = self.at(-hop)
        return source if hop <= self.last_hops[source] else None

    def is_passed_on(self, hop: int) -> bool:
        """Whether the keys that are here after some rounds go on."""
        source = self.source(hop)
        return source is not None and hop < self.last_hops[source]

    def start(
        self, sends: Sequence[tuple[Tensor, int]], receipts: Sequence[tuple[Tensor, int]]
    ) -> list[dist.Work]:
        """Starts the messages of a round, each a contiguous tensor and the rank it goes to or from.

        All of them in one batch: one by one, ranks would wait for each other in a circle.
        """
        ops = [
            dist.P2POp(op, x, group=self.group, group_peer=peer)
            for op, messages in ((dist.isend, sends), (dist.irecv, receipts))
            for x, peer in messages
        ]
        return dist.batch_isend_irecv(ops) if ops else []


@dataclass(frozen=True, kw_only=True)
class RingSoftmax:
    """Attention of a batch whose sequences are split over a ring: what to run, and how.

    Attributes:
        kernel: The block primitive, a module of `ops.kernels`.
        group: The ranks; None for one process by itself.
        layout: Which rank holds which rows.
        sight: Which keys a query sees.
        spans: Where the sequences lie.
        scale: Factor on the dot products.
        is_hidden: This rank's padding that is not at the end of its sequence, (b, c), or None.
        distance_bias: Additive logits by key minus query position, (h, 2m - 1), or None.
        dropout_p: Probability of attention dropout.
        seed: Seed of the attention dropout of this rank.
    """

    kernel: ModuleType
    group: dist.ProcessGroup | None
    layout: Layout
    sight: Sight
    spans: tuple[Span, ...]
    scale: float
    is_hidden: Tensor | None
    distance_bias: Tensor | None
    dropout_p: float
    seed: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns out (b, c, h, d) in the dtype of q and lse (b, c, h) in float32 or float64."""
        out = q.new_zeros(q.shape, dtype=_sum_dtype(q))
        lse = out.new_full(q.shape[:3], float("-inf"))
        q, k, v = self._without_hidden(q, k, v)
        ring, calls = self._ring(q.shape[1]), count()
        own = keys = self._parcel(k, v)
        for hop in range(ring.num_hops + 1):
            arriving = _emptied(own) if ring.source(hop + 1) is not None else []
            works = ring.start(
                [(x, ring.at(1)) for x in keys if ring.is_passed_on(hop)],
                [(x, ring.at(-1)) for x in arriving],
            )
            for piece in self._pieces(q, keys, ring.source(hop), calls):
                k_rows, v_rows = (piece.keys(x) for x in keys[0])
                results = self.kernel.forward(piece.queries(q), k_rows, v_rows, piece.options)
                merge_(piece.rows(out), piece.rows(lse), *map(piece.turned, results))
            _wait(works)
            keys = arriving
        if self.is_hidden is not None:
            out.masked_fill_(self.is_hidden[:, :, None, None], 0.0)
            lse.masked_fill_(self.is_hidden[:, :, None], float("-inf"))
        return out.to(q.dtype), lse

    def backward(
        self,
        out_grad: Tensor,
        lse_grad: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns the gradients of q, k, v and of the bias (None without one)."""
        # A row that saw nothing has no weights: exp(logits - inf) = 0.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        q, k, v, out_grad = self._without_hidden(q, k, v, out_grad)
        q_sum = q.new_zeros(q.shape, dtype=lse.dtype)
        queries = [out_grad, q, out, lse, *([] if lse_grad is None else [lse_grad])]
        bias_grad = None
        if self.distance_bias is not None:
            bias_grad = torch.zeros_like(self.distance_bias, dtype=lse.dtype)
        ring, calls = self._ring(q.shape[1]), count()
        own = keys = self._parcel(k, v)
        sums = own_sums = torch.zeros_like(own[0], dtype=lse.dtype)
        passed: list[tuple[Tensor, int]] = []  # gradients of the round before, and to whom they go
        for hop in range(ring.num_hops + 2):
            source = ring.source(hop)
            arriving = _emptied(own) if ring.source(hop + 1) is not None else []
            # The first rank that gets keys gets no gradients with them: their owner keeps its own.
            followers = _emptied([own_sums]) if hop > 1 and source is not None else []
            is_home = 0 < ring.last_hops[ring.rank] == hop - 1
            homecomers = _emptied([own_sums]) if is_home else []
            works = ring.start(
                [(x, ring.at(1)) for x in keys if ring.is_passed_on(hop)] + passed,
                [(x, ring.at(-1)) for x in arriving + followers]
                + [(x, ring.at(hop - 1)) for x in homecomers],
            )
            passed = []
            if hop > 0 and source is not None:
                sums = torch.zeros_like(own_sums)
                passed = [(sums, ring.at(1) if ring.is_passed_on(hop) else source)]
            for piece in self._pieces(q, keys, source, calls, bias_grad):
                q_grad, *kv_grads = self._piece_grads(piece, queries, keys[0])
                piece.rows(q_sum).add_(q_grad)
                piece.add_to_keys(sums, kv_grads)
            _wait(works)
            for x in followers:
                sums += x
            for x in homecomers:
                own_sums += x
            keys = arriving
        k_grad, v_grad = (x.to(k.dtype, copy=True) for x in own_sums)  # operators return no views
        if bias_grad is not None and self.distance_bias is not None:
            bias_grad = bias_grad.to(self.distance_bias.dtype)
        return q_sum.to(q.dtype), k_grad, v_grad, bias_grad

    def _piece_grads(self, piece: _Piece, queries: list[Tensor], kv: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v of one kernel call, rows in the order of the rank."""
        out_grad, q, out, lse, *lse_grad = (piece.queries(x) for x in queries)
        k, v = (piece.keys(x) for x in kv)
        grads = self.kernel.backward(out_grad, q, k, v, out, lse, piece.options, *lse_grad)
        return tuple(map(piece.turned, grads))

    def _ring(self, length: int) -> Ring:
        size = 1 if self.group is None else self.group.size()
        bounds = tuple(dict.fromkeys(span.bounds for span in self.spans))
        hops = last_hops(size, length, self.layout, self.sight, bounds)
        return Ring(group=self.group, last_hops=hops)

    def _parcel(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """What travels: keys with values (2, b, c, g, d), and the mask of hidden ones (b, c)."""
        mask = [] if self.is_hidden is None else [self.is_hidden.to(torch.uint8)]
        return [x.contiguous() for x in (torch.stack((k, v)), *mask)]

    def _without_hidden(self, *tensors: Tensor) -> list[Tensor]:
        """Zeroes the rows of padding, whose weight of zero would not silence a NaN in them."""
        if self.is_hidden is None:
            return list(tensors)
        return [x.masked_fill(self.is_hidden[:, :, None, None], 0.0) for x in tensors]

    def _pieces(
        self,
        q: Tensor,
        keys: list[Tensor],
        source: int | None,
        calls: Iterator[int],
        bias_grad: Tensor | None = None,
    ) -> Iterator[_Piece]:
        """Lists the kernel calls of this rank's queries with the keys of a rank."""
        if source is None:
            return
        size = 1 if self.group is None else self.group.size()
        rank = 0 if self.group is None else self.group.rank()
        own, theirs = (runs_of(x, size, q.shape[1], self.layout) for x in (rank, source))
        num_groups = keys[0].shape[3]
        group_size = q.shape[2] // num_groups
        # Heads that share keys are called by themselves, the keys repeated without a copy.
        num_calls = num_groups if group_size > 1 else 1
        for span in self.spans:
            batch = slice(span.first, span.stop)
            for tile in tiles_between(own, theirs, self.sight, span.bounds):
                for index in range(num_calls):
                    heads = slice(index * group_size, (index + 1) * group_size)
                    key_heads = slice(index, index + 1)
                    if group_size == 1:
                        heads = key_heads = slice(0, num_groups)
                    dropout = Dropout(probability=self.dropout_p, seed=(self.seed, next(calls)))
                    options = BlockOptions(
                        scale=self.scale,
                        is_causal=tile.kind != "full",
                        is_kv_shared=group_size > 1,
                        bias=self._bias(batch, tile, heads, keys[1:], bias_grad),
                        dropout=dropout if self.dropout_p else None,
                    )
                    yield _Piece(
                        batch=batch,
                        tile=tile,
                        heads=heads,
                        key_heads=key_heads,
                        group_size=group_size,
                        options=options,
                    )

    def _bias(
        self,
        batch: slice,
        tile: Tile,
        heads: slice,
        masks: list[Tensor],
        bias_grad: Tensor | None,
    ) -> LogitBias | None:
        if self.distance_bias is None and not masks:
            return None
        is_anti = tile.kind == "anti"
        is_hidden = None
        if masks:
            is_hidden = masks[0][batch, tile.keys.start : tile.keys.stop, None].bool()
            is_hidden = is_hidden.flip(1) if is_anti else is_hidden
        return LogitBias(
            row_step=-tile.row_step if is_anti else tile.row_step,
            key_offset=tile.key_offset,
            by_distance=None if self.distance_bias is None else self.distance_bias[heads],
            by_distance_grad=None if bias_grad is None else bias_grad[heads],
            is_hidden=is_hidden,
        )


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One kernel call: which parts of its tensors it reads and writes, and how."""

    batch: slice
    tile: Tile
    heads: slice
    key_heads: slice
    group_size: int  # query heads that share a key head
    options: BlockOptions

    def rows(self, x: Tensor) -> Tensor:
        """Views the query rows of x (b, c, h, ...)."""
        return x[self.batch, self.tile.rows.start : self.tile.rows.stop, self.heads]

    def queries(self, x: Tensor) -> Tensor:
        """The query rows of x (b, c, h, ...) as the kernel wants them."""
        return self.turned(self.rows(x))

    def keys(self, x: Tensor) -> Tensor:
        """The key rows of x (b, c, g, d) as the kernel wants them."""
        x = self.turned(self._key_rows(x))
        return x.expand(-1, -1, self.group_size, -1) if self.group_size > 1 else x

    def turned(self, x: Tensor) -> Tensor:
        """Puts rows in reverse order where they see the keys from their own on; and back."""
        return x.flip(1) if self.tile.kind == "anti" else x

    def add_to_keys(self, sums: Tensor, grads: Sequence[Tensor]) -> None:
        """Adds gradients of keys and values, as a kernel made them, to sums (2, b, c, g, d)."""
        for total, grad in zip(sums, grads, strict=True):
            if self.group_size > 1:
                grad = grad.sum(2, keepdim=True, dtype=total.dtype)
            self._key_rows(total).add_(grad)

    def _key_rows(self, x: Tensor) -> Tensor:
        return x[self.batch, self.tile.keys.start : self.tile.keys.stop, self.key_heads]


def _emptied(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
