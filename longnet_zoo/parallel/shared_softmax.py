"""Attention to own keys and to those of other processes, in one softmax.

Shape legend: b batch, c tokens of a part, h heads, d head_dim, m rows that travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor

from longnet_zoo.ops.joint_softmax import JointSoftmax, Piece
from longnet_zoo.ops.schedule import view_rows

from .exchange import Exchange, ExchangePlan, region_views

__all__ = ["SharedSoftmax"]


@dataclass(frozen=True, kw_only=True)
class SharedSoftmax(JointSoftmax):
    """The problem of a `JointSoftmax` over parts, with the keys of other processes.

    Attributes:
        exchange: How the keys of the others come.
        own: Attends to the part as if it were all, where that is the same and quicker; None: block
            by block.
        buffer: The rows that came, (m, 2 d) or with a mask beside; empty before the forward pass.
    """

    exchange: Exchange
    own: JointSoftmax | None = None
    buffer: list[Tensor] = field(default_factory=list)

    @property
    def _plan(self) -> ExchangePlan:
        return self.exchange.plan

    def _pieces(
        self,
        query_tensors: list[Tensor],
        kv_tensors: list[Tensor],
        bias_grad: Tensor | None = None,
    ) -> Iterator[Piece]:
        """Lists the calls with own keys and those with keys of other processes."""
        if self.own is None:
            own = super()._pieces(query_tensors, kv_tensors, bias_grad)
        else:
            own = self._own_at_once(self.own, query_tensors, kv_tensors, bias_grad)
        if self._plan.is_idle:
            yield from own
        elif len(kv_tensors) == 2:
            yield from self._forward_pieces(own, query_tensors, kv_tensors)
        else:
            yield from self._backward_pieces(own, query_tensors, kv_tensors, bias_grad)

    def _own_at_once(
        self,
        own: JointSoftmax,
        query_tensors: list[Tensor],
        kv_tensors: list[Tensor],
        bias_grad: Tensor | None,
    ) -> Iterator[Piece]:
        """Writes or adds what comes of the own keys, and leaves no call to be made."""
        if len(kv_tensors) == 2:
            q, *results = query_tensors
            found = own.forward(q, *kv_tensors)
            for result, value in zip(results, found, strict=True):
                result.copy_(value)
        else:
            q, out_grad, out, lse, q_sum, *lse_grads = query_tensors
            k, v, k_sum, v_sum = kv_tensors
            lse_grad = lse_grads[0] if lse_grads else None
            grads = own.backward(out_grad, lse_grad, q, k, v, out, lse)
            for total, grad in zip((q_sum, k_sum, v_sum, bias_grad), grads, strict=True):
                if total is not None and grad is not None:
                    total.add_(grad)
        yield from ()

    def _forward_pieces(
        self, own: Iterator[Piece], query_tensors: list[Tensor], kv_tensors: list[Tensor]
    ) -> Iterator[Piece]:
        hidden_rows = None
        if self.is_hidden is not None:
            mask = self.is_hidden[..., None].expand(kv_tensors[0].shape[:3]).to(torch.uint8)
            hidden_rows = self.exchange.start(mask)
        rows = self.exchange.start(*kv_tensors)
        yield from own
        self.buffer.append(self.exchange.sorted(rows.wait()))
        if hidden_rows is not None:
            self.buffer.append(self.exchange.sorted(hidden_rows.wait()[:, 0]).bool())
        yield from self._foreign_pieces(query_tensors, list(self.buffer[0].chunk(2, dim=1)))

    def _backward_pieces(
        self,
        own: Iterator[Piece],
        query_tensors: list[Tensor],
        kv_tensors: list[Tensor],
        bias_grad: Tensor | None,
    ) -> Iterator[Piece]:
        # The gradients of the others' rows travel while those of the own rows are computed.
        sums = self.buffer[0].new_zeros(self.buffer[0].shape, dtype=kv_tensors[2].dtype)
        buffers = [*self.buffer[0].chunk(2, dim=1), *sums.chunk(2, dim=1)]
        yield from self._foreign_pieces(query_tensors, buffers, bias_grad)
        rows = self.exchange.start_back(sums)
        for piece in own:
            yield replace(piece, is_first=False)
        for total, grads in zip(kv_tensors[2:], rows.wait().chunk(2, dim=1), strict=True):
            self.exchange.add_(total, grads)

    def _foreign_pieces(
        self,
        query_tensors: list[Tensor],
        buffers: list[Tensor],
        bias_grad: Tensor | None = None,
    ) -> Iterator[Piece]:
        """Lists the calls with keys of other processes."""
        calls = count(_OTHER_CALLS)
        regions = self._plan.regions
        kv_views = zip(*(region_views(x, regions) for x in buffers), strict=True)
        masks: Sequence[Tensor | None] = [None] * len(regions)
        if self.is_hidden is not None:
            masks = list(region_views(self.buffer[1], regions))
        for region, others, mask in zip(regions, kv_views, masks, strict=True):
            block = region.block
            views = [view_rows(region.group.select(x), block) for x in query_tensors]
            views += others
            yield from self._other_pieces(
                block,
                views,
                calls,
                first_key=region.first_key,
                bias_grad=bias_grad,
                is_hidden=mask,
            )

    def _sums(self, x: Tensor, *, fill: float = 0.0) -> Tensor:
        """Makes what results are added to; in the backward pass others' keys come first."""
        sums = super()._sums(x, fill=fill)
        return sums.fill_(fill) if self.buffer else sums


# Numbers of the calls with keys of other processes, beyond those with own keys.
_OTHER_CALLS = 2**40
