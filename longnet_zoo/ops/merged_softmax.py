"""Dilated attention by any kernel of plain attention, its branches merged by one Triton launch.

The kernel leaves what it finds for each branch in compact partials, as it is. One launch then reads
the partials of every row once and writes the row once, where adding up block by block in float32
would read and write the sums of all rows for every branch.

Shape legend: b batch, n seq_len, h heads, d head_dim, p partials of a head; a block's views are
(b, s, t, u, ...) with s segments, t rows, u heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .fused_schedule import FusedSchedule
from .fused_softmax import FusedSoftmax, kernel_rows, launch_last, on_device
from .joint_softmax import folded
from .merge import add_zero_keys_
from .schedule import Block, blocks_of, view_rows
from .sequences import SequenceGroup

__all__ = ["MergedSoftmax"]


@dataclass(frozen=True, kw_only=True)
class MergedSoftmax(FusedSoftmax):
    """The problem of a `JointSoftmax`, solved by its kernel and the Triton kernels that merge.

    It has nothing added to its logits, no dropout, as many key heads as query heads, and xPos only
    with segments that nest.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns out (b, n, h, d) in the dtype of q and lse (b, n, h) in float32."""
        from .kernels.triton_forward import attend_rows
        from .kernels.triton_parts import LOG2_E

        q, k = self._decay_all(q, k)
        setup = self._setup(q, k, attends=False)
        partial_out = self._partials_of(q, setup.schedule)
        partial_lse = self._partials_of(q[..., 0], setup.schedule, dtype=torch.float32)
        for block, views in self._calls([q, k, v], [partial_out, partial_lse], setup.schedule):
            *inputs, out_rows, lse_rows = views
            out, lse = self.kernel.forward(*inputs, self.plain_options)
            if block.num_zero_keys:
                add_zero_keys_(out, lse, block.num_zero_keys)
            out_rows.copy_(out)
            torch.mul(lse, LOG2_E.value, out=lse_rows)
        out, lse = self._results(q)
        with on_device(q):
            tensors = (*(kernel_rows(x) for x in (q, k, v)), out, lse, partial_out, partial_lse)
            launch_last(attend_rows, tensors, setup, "BLOCK_M")
        return out, lse

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
        """Returns the gradients of q, k and v, and None, since there is no bias."""
        from .kernels.triton_backward import key_gradients, query_gradient

        assert lse_grad is None, "the kernels refuse it"
        dtype = q.dtype
        q, k = self._decay_all(q, k)
        setup = self._setup(q, k, attends=False)
        partials = [self._partials_of(x, setup.schedule) for x in (q, k, v)]
        saved = [out_grad, q, k, v, out, lse]
        for _, views in self._calls(saved, partials, setup.schedule):
            new_grads = self.kernel.backward(*views[:6], self.plain_options)
            for rows, grad in zip(views[6:], new_grads, strict=True):
                rows.copy_(grad)
        q_grad, k_grad, v_grad = self._gradients(q, k, v)
        with on_device(q):
            inputs = (*(kernel_rows(x) for x in (q, k, v, out_grad)), lse, lse)
            launch_last(query_gradient, (*inputs, q_grad, partials[0]), setup, "BLOCK_M")
            results = (k_grad, v_grad, *partials[1:])
            launch_last(key_gradients, (*inputs, *results), setup, "BLOCK_N")
        q_grad, k_grad = self._decay_all(q_grad, k_grad)
        return q_grad.to(dtype), k_grad.to(dtype), v_grad, None

    def _partials_of(
        self, x: Tensor, schedule: FusedSchedule, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Makes partials (h, p, ...) of a tensor (b, n, h, ...)."""
        shape = (x.shape[2], schedule.num_partials, *x.shape[3:])
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)

    def _calls(
        self, tensors: list[Tensor], partials: list[Tensor], schedule: FusedSchedule
    ) -> Iterator[tuple[Block, list[Tensor]]]:
        """Lists the kernel calls: views of the tensors' rows, then of their partials."""
        lines = {(line[0], line[1]): line[3:] for line in schedule.sequences.tolist()}
        num_heads = tensors[0].shape[2]
        for group in self.groups:
            firsts = lines[group.starts()[0]]
            for block in blocks_of(
                self.pattern, group.length, num_heads, num_heads, self.is_causal
            ):
                views = [view_rows(group.select(x), block) for x in tensors]
                first = firsts[block.branch]
                views += [_view_partials(x, block, group, schedule, first) for x in partials]
                for part in folded(views):
                    yield block, part


def _view_partials(
    x: Tensor, block: Block, group: SequenceGroup, schedule: FusedSchedule, first: int
) -> Tensor:
    """The block's partials of a tensor (h, p, ...) as a strided view (b, s, t, u, ...)."""
    full_rows = schedule.segment_rows(block.branch, group.length)
    per_sequence = schedule.num_rows(block.branch, group.length)
    head, row, *rest = x.stride()
    start = first + block.row_start // block.segment_stride * full_rows
    return x.as_strided(
        (group.count, block.num_segments, block.num_rows, block.num_heads, *x.shape[2:]),
        (per_sequence * row, full_rows * row, row, block.head_step * head, *rest),
        x.storage_offset() + start * row + block.head_start * head,
    )
