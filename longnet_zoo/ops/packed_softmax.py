"""Sequences of different lengths at once: one kernel call for all segments of a branch.

Block by block, a batch of many short documents would be thousands of small calls. Here the rows of
all segments of all sequences are gathered, and a kernel of packed sequences attends to each segment
by itself: one call for each branch and head offset.

Shape legend: b batch, n seq_len, h heads, d head_dim, m gathered rows, u heads of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .joint_softmax import JointSoftmax
from .merge import merge_

__all__ = ["PackedSoftmax"]


@dataclass(frozen=True, kw_only=True)
class _Pack:
    """One kernel call: indices into tensors (b * n, h, ...), and where segments begin and end."""

    index: tuple[Tensor, Tensor]
    kv_index: tuple[Tensor, Tensor]
    bounds: Tensor
    max_rows: int


@dataclass(frozen=True, kw_only=True)
class PackedSoftmax(JointSoftmax):
    """The problem of a `JointSoftmax` for a kernel that has `forward_packed`.

    It has nothing added to its logits, no dropout, `padded_keys="ignore"`, and xPos only with
    segments that nest.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns out (b, n, h, d) in the dtype of q and lse (b, n, h) in float32."""
        out, lse = self._sums(q).zero_(), self._sums(q[..., 0]).fill_(float("-inf"))
        q, k = self._decay_all(q, k)
        for pack in self._packs(q, k):
            new_out, new_lse = self.kernel.forward_packed(
                _gathered(q, pack.index),
                _gathered(k, pack.kv_index),
                _gathered(v, pack.kv_index),
                pack.bounds,
                pack.max_rows,
                self.plain_options,
            )
            joint = _gathered(out, pack.index), _gathered(lse, pack.index)
            merge_(*joint, new_out, new_lse)
            for total, rows in zip((out, lse), joint, strict=True):
                if rows.shape != total.flatten(0, 1).shape:  # else it is a view of all rows
                    total.flatten(0, 1).index_put_(pack.index, rows)
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
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Returns the gradients of q, k and v, and None, since there is no bias."""
        assert lse_grad is None, "the kernels refuse it"
        grads = [self._sums(x).zero_() for x in (q, k, v)]
        q, k = self._decay_all(q, k)
        for pack in self._packs(q, k):
            new_grads = self.kernel.backward_packed(
                *(_gathered(x, pack.index) for x in (out_grad, q)),
                *(_gathered(x, pack.kv_index) for x in (k, v)),
                *(_gathered(x, pack.index) for x in (out, lse)),
                pack.bounds,
                pack.max_rows,
                self.plain_options,
            )
            indices = (pack.index, pack.kv_index, pack.kv_index)
            for total, index, grad in zip(grads, indices, new_grads, strict=True):
                total.flatten(0, 1).index_put_(index, grad.to(total.dtype), accumulate=True)
        grads[:2] = self._decay_all(*grads[:2])
        q_grad, k_grad, v_grad = (grad.to(v.dtype) for grad in grads)
        return q_grad, k_grad, v_grad, None

    def _packs(self, q: Tensor, k: Tensor) -> Iterator[_Pack]:
        num_heads, group_size = q.shape[2], q.shape[2] // k.shape[2]
        starts, lengths = self._sequences(q.shape[1])
        for branch, (segment_length, rate) in enumerate(self.pattern.branches):
            segments = _segments(starts, lengths, segment_length)
            offsets = self.pattern.offsets(branch, num_heads)
            for offset in sorted(set(offsets)):
                rows, counts = _rows(*segments, rate, offset)
                if not len(rows):
                    continue
                heads = [head for head in range(num_heads) if offsets[head] == offset]
                rows = rows.to(q.device)[:, None]
                yield _Pack(
                    index=(rows, torch.tensor(heads, device=q.device)),
                    kv_index=(rows, _kv_heads(heads, group_size).to(q.device)),
                    bounds=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int().to(q.device),
                    max_rows=int(counts.max()),
                )

    def _sequences(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Start in (b * n,) and length of each sequence."""
        starts, lengths = [], []
        for group in self.groups:
            starts += [row * seq_len + first for row, first in group.starts()]
            lengths += [group.length] * group.count
        return torch.tensor(starts), torch.tensor(lengths)


def _segments(starts: Tensor, lengths: Tensor, segment_length: int) -> tuple[Tensor, Tensor]:
    """Start and length of each segment of each sequence."""
    counts = (lengths + segment_length - 1) // segment_length
    places = _ranges(counts) * segment_length
    rest = lengths.repeat_interleave(counts) - places
    return starts.repeat_interleave(counts) + places, rest.clamp_max(segment_length)


def _rows(starts: Tensor, lengths: Tensor, rate: int, offset: int) -> tuple[Tensor, Tensor]:
    """Every `rate`-th row of each segment from its `offset` on, and their counts, if any."""
    counts = (lengths - offset + rate - 1) // rate
    return starts.repeat_interleave(counts) + offset + rate * _ranges(counts), counts[counts > 0]


def _ranges(counts: Tensor) -> Tensor:
    """0, 1, ..., count - 1 for each count, in one row."""
    ends = counts.cumsum(0)
    return torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)


def _kv_heads(heads: list[int], group_size: int) -> Tensor:
    """Key heads to gather: each once if a kernel then finds them, else one for each query head."""
    kv_heads = torch.tensor(heads) // group_size
    unique, counts = kv_heads.unique_consecutive(return_counts=True)
    return unique if bool((counts == counts[0]).all()) else kv_heads


def _gathered(x: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    """Rows and heads of x (b, n, h, ...) as (m, u, ...); a view if they are all there are."""
    flat = x.flatten(0, 1)
    is_whole = (len(index[0]), len(index[1])) == tuple(flat.shape[:2])
    return flat if is_whole else flat[index]
