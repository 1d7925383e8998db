"""Many blocks, one softmax: a kernel is run on every block, and the results become one.

Forward: each block's output joins the rows it covers by its LSE. Backward: each block's backward
runs with the joint output and LSE of its rows. P = exp(logits - joint LSE) and
delta = rowsum(out_grad * joint out) are then those of the whole softmax, so the gradients are
exact, the mixing of the branches included.

Shape legend: b batch, n seq_len, h heads, d head_dim; a block's views are (b, s, t, u, ...) with s
segments, t rows, u heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from types import ModuleType

import torch
from torch import Tensor

from .kernels.bias import LogitBias
from .kernels.call import BlockOptions, Dropout
from .merge import add_zero_keys_, merge_
from .pattern import DilatedPattern
from .positions import float64_device, xpos_factors
from .schedule import Block, blocks_of, view_pairs, view_rows
from .sequences import SequenceGroup

__all__ = ["JointSoftmax", "Piece", "folded"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One kernel call: the block it belongs to, views of its rows, and how to attend them."""

    block: Block
    views: list[Tensor]
    options: BlockOptions
    is_first: bool  # no earlier piece covers these rows
    first_key: int  # the row of the segment that is the first key

    @property
    def is_own(self) -> bool:
        """Whether keys and queries are the same rows."""
        return self.first_key == self.block.num_before


@dataclass(frozen=True, kw_only=True)
class JointSoftmax:
    """Dilated attention of a batch: what to run, and how.

    Attributes:
        pattern: The schedule.
        kernel: The block primitive, a module of `ops.kernels`.
        groups: The sequences that are attended by themselves.
        is_causal: Whether a query sees only the keys up to itself.
        scale: Factor on the dot products.
        xpos_scale_base: Base of the xPos decay, or None.
        is_hidden: Padding that is not at the end of its row, (b, n), or None.
        dense_bias: Additive logits, (b or 1, h or 1, n, n), or None.
        distance_bias: Additive logits by key minus query position, (h, 2m - 1), or None.
        dropout_p: Probability of attention dropout.
        seed: Seed of the attention dropout.
        out_dtype: Dtype of the output; None: that of the values.
    """

    pattern: DilatedPattern
    kernel: ModuleType
    groups: list[SequenceGroup]
    is_causal: bool
    scale: float
    xpos_scale_base: float | None
    is_hidden: Tensor | None
    dense_bias: Tensor | None
    distance_bias: Tensor | None
    dropout_p: float
    seed: int
    out_dtype: torch.dtype | None = None

    @property
    def plain_options(self) -> BlockOptions:
        """Options of a kernel call with nothing added to its logits."""
        return BlockOptions(scale=self.scale, is_causal=self.is_causal)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns out (b, n, h, d) in the dtype of q and lse (b, n, h) in float32 or float64."""
        out, lse = self._sums(q), self._sums(q[..., 0], fill=float("-inf"))
        q, k, v = self._laid_out(*self._without_hidden(q, k, v))
        q, k = self._decay_all(q, k)
        for piece in self._pieces([q, out, lse], [k, v]):
            q_rows, out_rows, lse_rows, k_rows, v_rows = piece.views
            q_rows, k_rows = self._decay_block(q_rows, k_rows, piece)
            new_out, new_lse = self.kernel.forward(q_rows, k_rows, v_rows, piece.options)
            if piece.is_own and piece.block.num_zero_keys:
                add_zero_keys_(new_out, new_lse, piece.block.num_zero_keys)
            if piece.is_first:
                out_rows.copy_(new_out)
                lse_rows.copy_(new_lse)
            else:
                merge_(out_rows, lse_rows, new_out, new_lse)
        if self.is_hidden is not None:
            out.masked_fill_(self.is_hidden[:, :, None, None], 0.0)
            lse.masked_fill_(self.is_hidden[:, :, None], float("-inf"))
        return out.to(self.out_dtype or v.dtype), lse

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
        grads = [self._sums(x) for x in (q, k, v)]
        q, k, v, out_grad = self._laid_out(*self._without_hidden(q, k, v, out_grad))
        out, lse = self._laid_out(out, lse)
        q, k = self._decay_all(q, k)
        bias = self.dense_bias if self.dense_bias is not None else self.distance_bias
        bias_grad = None
        if bias is not None:  # contiguous, whatever the strides of the bias
            bias_grad = torch.zeros(bias.shape, dtype=_sum_dtype(v), device=v.device)
        queries = [q, out_grad, out, lse, grads[0]]
        if lse_grad is not None:
            queries += self._laid_out(lse_grad)
        for piece in self._pieces(queries, [k, v, grads[1], grads[2]], bias_grad):
            q_rows, out_grad_rows, out_rows, lse_rows, q_sum, *rest = piece.views
            lse_grad_rows = rest.pop(0) if lse_grad is not None else None
            k_rows, v_rows, k_sum, v_sum = rest
            decayed_q, decayed_k = self._decay_block(q_rows, k_rows, piece)
            q_grad, k_grad, v_grad = self.kernel.backward(
                out_grad_rows,
                decayed_q,
                decayed_k,
                v_rows,
                out_rows,
                lse_rows,
                piece.options,
                lse_grad_rows,
            )
            q_grad, k_grad = self._decay_block(q_grad, k_grad, piece)
            _add(q_sum, q_grad, is_first=piece.is_first)
            _add(k_sum, k_grad, is_first=piece.is_first)
            _add(v_sum, v_grad, is_first=piece.is_first)
        grads[:2] = self._decay_all(*grads[:2])
        q_grad, k_grad, v_grad = (grad.to(v.dtype) for grad in grads)
        if bias is not None and bias_grad is not None:
            bias_grad = bias_grad.to(bias.dtype)
        return q_grad, k_grad, v_grad, bias_grad

    def _pieces(
        self,
        query_tensors: list[Tensor],
        kv_tensors: list[Tensor],
        bias_grad: Tensor | None = None,
    ) -> Iterator[Piece]:
        """Lists the kernel calls; a branch of rate 1 comes first, since it covers every row."""
        num_heads, num_kv_heads = query_tensors[0].shape[2], kv_tensors[0].shape[2]
        calls = count()
        for group in self.groups:
            blocks = self._blocks(group, num_heads, num_kv_heads)
            # None for a part of a sequence in which no branch has a row.
            covering = (
                min((block.row_step, block.branch) for block in blocks)[1] if blocks else None
            )
            for block in sorted(blocks, key=lambda block: block.branch != covering):
                views = [view_rows(group.select(x), block) for x in query_tensors]
                views += [view_rows(group.select(x), block, is_kv=True) for x in kv_tensors]
                is_first = block.branch == covering and block.row_step == 1
                for part, bias in self._parts(views, group, block, bias_grad):
                    yield Piece(
                        block=block,
                        views=part,
                        options=self._options(block, bias, next(calls), self.is_causal),
                        is_first=is_first,
                        first_key=block.num_before,
                    )

    def _other_pieces(
        self,
        block: Block,
        views: list[Tensor],
        calls: Iterator[int],
        *,
        first_key: int,
        bias_grad: Tensor | None = None,
        is_hidden: Tensor | None = None,
    ) -> Iterator[Piece]:
        """Lists the calls of a block with keys from elsewhere, all of which it sees."""
        views = views if is_hidden is None else [*views, is_hidden]
        for part in folded(views):
            bias = None
            if self.distance_bias is not None or is_hidden is not None:
                key_offset = first_key - block.num_before
                bias = self._logit_bias(block, bias_grad, key_offset=key_offset)
            if bias is not None and is_hidden is not None:
                bias = replace(bias, is_hidden=part.pop())
            yield Piece(
                block=block,
                views=part,
                options=self._options(block, bias, next(calls), is_causal=False),
                is_first=False,
                first_key=first_key,
            )

    def _blocks(self, group: SequenceGroup, num_heads: int, num_kv_heads: int) -> tuple[Block, ...]:
        return blocks_of(
            self.pattern,
            group.seq_len,
            num_heads,
            num_kv_heads,
            self.is_causal,
            start=group.start,
            length=group.length,
        )

    def _options(
        self, block: Block, bias: LogitBias | None, call: int, is_causal: bool
    ) -> BlockOptions:
        """Options of kernel call number `call`."""
        dropout = Dropout(probability=self.dropout_p, seed=(self.seed, call))
        return BlockOptions(
            scale=self.scale,
            is_causal=is_causal,
            is_kv_shared=block.is_kv_shared,
            bias=bias,
            dropout=dropout if self.dropout_p else None,
        )

    def _parts(
        self, views: list[Tensor], group: SequenceGroup, block: Block, bias_grad: Tensor | None
    ) -> Iterator[tuple[list[Tensor], LogitBias | None]]:
        """Cuts a block into kernel calls, each with what is added to its logits."""
        if self.dense_bias is None and self.distance_bias is None and self.is_hidden is None:
            for part in folded(views):
                yield part, None
            return
        if self.is_hidden is not None:
            is_hidden = self.is_hidden.unsqueeze(-1).expand(-1, -1, block.heads.stop)
            views = [*views, view_rows(group.select(is_hidden), block)]
        dense = self._dense_views(self.dense_bias, group, block)
        dense_grad = self._dense_views(bias_grad, group, block) if dense is not None else None
        parts = folded(views) if dense is None else _one_by_one(views)
        for index, part in enumerate(parts):
            row, segment = divmod(index, block.num_segments)
            bias = self._logit_bias(block, bias_grad)
            if dense is not None:
                grad = None if dense_grad is None else _unshared(dense_grad[row, segment])
                bias = replace(bias, dense=dense[row, segment], dense_grad=grad)
            if self.is_hidden is not None:
                bias = replace(bias, is_hidden=part.pop())
            yield part, bias

    def _logit_bias(
        self, block: Block, bias_grad: Tensor | None, *, key_offset: int = 0
    ) -> LogitBias:
        """What depends on distances alone, for keys that begin `key_offset` rows after queries."""
        by_distance, heads = self.distance_bias, block.heads
        grad = None if by_distance is None else bias_grad
        return LogitBias(
            row_step=block.row_step,
            key_offset=key_offset * block.row_step,
            by_distance=None if by_distance is None else by_distance[heads],
            by_distance_grad=None if grad is None else grad[heads],
        )

    def _dense_views(
        self, bias: Tensor | None, group: SequenceGroup, block: Block
    ) -> Tensor | None:
        if bias is None or self.dense_bias is None:
            return None
        num_heads = block.heads.stop
        batch = group.first + group.count if not group.is_packed else 1
        bias = bias.expand(
            batch if bias.shape[0] == 1 else -1, num_heads if bias.shape[1] == 1 else -1, -1, -1
        )
        return view_pairs(group.select_pairs(bias), block)

    def _sums(self, x: Tensor, *, fill: float = 0.0) -> Tensor:
        """Makes what results are added to; left unwritten where first pieces cover every row."""
        is_covered = 1 in self.pattern.dilation_rates and (
            sum(group.count * group.length for group in self.groups) == x.shape[0] * x.shape[1]
        )
        sums = torch.empty(x.shape, dtype=_sum_dtype(x), device=x.device)
        return sums if is_covered else sums.fill_(fill)

    def _without_hidden(self, *tensors: Tensor) -> list[Tensor]:
        """Zeroes the rows of padding, whose weight of zero would not silence a NaN in them."""
        if self.is_hidden is None:
            return list(tensors)
        return [x.masked_fill(self.is_hidden[:, :, None, None], 0.0) for x in tensors]

    def _laid_out(self, *tensors: Tensor) -> list[Tensor]:
        """Makes tensors contiguous if there is dropout.

        Strides decide how a block is cut into calls, and each call draws its own dropout: the
        backward must cut as the forward did, whatever the strides of its gradient.
        """
        return [x.contiguous() for x in tensors] if self.dropout_p else list(tensors)

    def _decay_all(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Multiplies by the xPos factors of the longest segment, if the shorter ones nest in it."""
        if self.xpos_scale_base is None or not self.pattern.is_nested:
            return q, k
        longest = self.pattern.segment_lengths[-1]
        decayed = torch.zeros_like(q), torch.zeros_like(k)
        for group in self.groups:
            place = (_float64_range(group.length, q) + group.start) % longest
            factors = self._xpos_factors(place - (min(longest, group.seq_len) - 1) / 2, q)
            torch.mul(group.select(q), factors, out=group.select(decayed[0]))
            torch.mul(group.select(k), 1 / factors, out=group.select(decayed[1]))
        return decayed

    def _decay_block(self, q_rows: Tensor, k_rows: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """Multiplies by the xPos factors of the block's own segment, if segments do not nest."""
        if self.xpos_scale_base is None or self.pattern.is_nested:
            return q_rows, k_rows
        block = piece.block
        middle = (block.segment_rows - 1) / 2
        q_places, k_places = (
            (_float64_range(rows.shape[1], rows) + (first - middle)) * block.row_step
            for rows, first in ((q_rows, block.num_before), (k_rows, piece.first_key))
        )
        q_factors, k_factors = (
            self._xpos_factors(q_places, q_rows),
            self._xpos_factors(k_places, k_rows),
        )
        return (q_rows * q_factors).to(q_rows.dtype), (k_rows / k_factors).to(k_rows.dtype)

    def _xpos_factors(self, places: Tensor, like: Tensor) -> Tensor:
        """Makes zeta ** (place / scale_base) for queries, (places, 1, d); keys take the inverse.

        Places count from the middle of a segment, where the factors are smallest.
        """
        assert self.xpos_scale_base is not None
        base, dtype = self.xpos_scale_base, _sum_dtype(like)
        factors = xpos_factors(places, head_dim=like.shape[-1], scale_base=base, dtype=dtype)
        return factors.unsqueeze(1).to(like.device)


# Rows of one kernel call, where a block has several segments: bounds the memory of its results. A
# GPU needs large calls to be busy.
_CPU_ROWS_PER_CALL = 2**13
_GPU_ROWS_PER_CALL = 2**18


def folded(views: list[Tensor]) -> Iterator[list[Tensor]]:
    """Joins batch and segments (b, s, ...) into the batch of few calls, without a copy."""
    batch, num_segments, num_rows = views[0].shape[:3]
    if batch == 1:
        rows = [view[0] for view in views]
    elif num_segments == 1:
        rows = [view[:, 0] for view in views]
    elif all(view.stride(0) == num_segments * view.stride(1) for view in views):
        rows = [view.flatten(0, 1) for view in views]
    else:
        axis = 0 if batch <= num_segments else 1
        for index in range(min(batch, num_segments)):
            yield from folded([view.narrow(axis, index, 1) for view in views])
        return
    max_rows = _CPU_ROWS_PER_CALL if views[0].device.type == "cpu" else _GPU_ROWS_PER_CALL
    size = max(1, max_rows // num_rows)
    yield from (list(part) for part in zip(*(row.split(size) for row in rows), strict=True))


def _one_by_one(views: list[Tensor]) -> Iterator[list[Tensor]]:
    """Each segment of each batch row by itself."""
    for row in range(views[0].shape[0]):
        for segment in range(views[0].shape[1]):
            yield [view[row, segment : segment + 1] for view in views]


def _add(total: Tensor, grad: Tensor, *, is_first: bool) -> None:
    """Adds the gradient of a call (b, t, u, d) to the sums of its rows."""
    if total.stride(2) == 0 and total.shape[2] > 1:  # one key head serves all heads of the call
        total, grad = total[:, :, :1], grad.sum(2, keepdim=True)
    if is_first:
        total.copy_(grad)
    else:
        total.add_(grad)


def _unshared(bias_grad: Tensor) -> Tensor:
    """The view (u, t, t) with a head axis of one where all heads share the bias."""
    return bias_grad[:1] if bias_grad.stride(0) == 0 else bias_grad


def _float64_range(length: int, like: Tensor) -> Tensor:
    # On the device of `like`: a copy would stall a GPU, and end a CUDA graph.
    return torch.arange(length, dtype=torch.float64, device=float64_device(like.device))


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Sums over branches are kept in at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
