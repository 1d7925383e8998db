"""Dilated attention by a few Triton launches: one for each branch, and no tensor of a branch.

Branches of rates above 1 leave partials: compact float32 results of the rows they have, the sum of
1 / rate of them per token and head. The launch of the branch of rate 1 merges them and writes each
row once. Heads are worked through in passes, so that the partials stay small at any length.

Shape legend: b batch, n seq_len, h heads, d head_dim, p partials of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .fused_schedule import FusedSchedule, fused_schedule
from .joint_softmax import JointSoftmax

__all__ = ["FusedSoftmax", "kernel_rows", "launch_last", "on_device"]

# Memory of the partials of a pass.
_PASS_BYTES = 2**30
# A CUDA graph copies the tables again whenever it is replayed, from where they lie now.
_CAPTURED: list[FusedSchedule] = []
_DELTA_BLOCK = 64
_BAND_BLOCK = 32
# As many programmes as keep a large GPU busy.
_BAND_PROGRAMMES = 1024


class _Setup(NamedTuple):
    """What all launches of a call share."""

    schedule: FusedSchedule
    problem: Any  # kernels.triton_parts.Problem
    kinds: list[Any]  # kernels.triton_parts.Kind, by branch

    def problem_from(self, first: int) -> Any:
        """The problem with the sequences from number `first` on."""
        return self.problem._replace(sequences=self.problem.sequences[first:])


@dataclass(frozen=True, kw_only=True)
class FusedSoftmax(JointSoftmax):
    """The problem of a `JointSoftmax`, solved by the Triton kernels."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns out (b, n, h, d) in the dtype of q and lse (b, n, h) in float32."""
        from .kernels.triton_forward import attend_rows

        q, k = self._decay_all(q, k)
        out, lse = self._results(q)
        setup = self._setup(q, k)
        num_partials, head_dim = setup.schedule.num_partials, q.shape[3]
        inputs = [kernel_rows(x) for x in (q, k, v)]
        with on_device(q):
            for heads in _passes(q, num_partials, num_values=head_dim + 1, group_size=1):
                partial_out = _partials(q, heads, num_partials, head_dim)
                partial_lse = _partials(q, heads, num_partials)
                results = (out, lse, partial_out, partial_lse)
                _launch(attend_rows, (*inputs, *results), setup, heads, "BLOCK_M")
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
        """Returns the gradients of q, k, v and of the bias (None without one)."""
        from .kernels.triton_backward import key_gradients, query_gradient

        dtype = q.dtype
        q, k = self._decay_all(q, k)
        q_grad, k_grad, v_grad = self._gradients(q, k, v)
        setup = self._setup(q, k)
        num_partials, head_dim = setup.schedule.num_partials, q.shape[3]
        group_size = q.shape[2] // k.shape[2]
        lse = lse.contiguous()
        with on_device(q):
            delta = _deltas(out_grad, out.contiguous(), lse_grad, setup)
            inputs = (*(kernel_rows(x) for x in (q, k, v, out_grad)), lse, delta)
            for heads in _passes(q, num_partials, num_values=head_dim, group_size=1):
                partials = _partials(q, heads, num_partials, head_dim)
                _launch(query_gradient, (*inputs, q_grad, partials), setup, heads, "BLOCK_M")
            del partials
            for heads in _passes(q, num_partials, num_values=2 * head_dim, group_size=group_size):
                pair = [_partials(q, heads, num_partials, head_dim) for _ in range(2)]
                _launch(
                    key_gradients,
                    (*inputs, k_grad, v_grad, *pair),
                    setup,
                    heads,
                    "BLOCK_N",
                    group_size=group_size,
                )
            del pair
            bias_grad = None
            if self.distance_bias is not None:
                bias_grad = self._bias_gradient(inputs, setup, num_heads=q.shape[2])
        q_grad, k_grad = self._decay_all(q_grad, k_grad)
        return q_grad.to(dtype), k_grad.to(dtype), v_grad, bias_grad

    def _setup(self, q: Tensor, k: Tensor, *, attends: bool = True) -> _Setup:
        from .kernels.triton_parts import Problem, make_kinds

        schedule = fused_schedule(
            self.pattern, tuple(self.groups), q.shape[2], q.is_cuda, attends=attends
        )
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            _CAPTURED.append(schedule)
        tables = {
            name: getattr(schedule, name).to(q.device, non_blocking=True)
            for name in ("sequences", "branches", "offsets")
        }
        bias, is_hidden = self.distance_bias, self.is_hidden
        kinds = make_kinds(
            head_dim=q.shape[3],
            num_others=schedule.last,
            attends=schedule.attends,
            is_causal=self.is_causal,
            zero_keys=self.pattern.padded_keys == "zero" and not self.is_causal,
            has_bias=bias is not None,
            has_hidden=is_hidden is not None,
            has_dropout=self.dropout_p > 0,
            dtype=q.dtype,
        )
        # A pointer that is never read still has to be one.
        unread = tables["branches"]
        problem = Problem(
            **tables,
            seq_len=q.shape[1],
            num_heads=q.shape[2],
            group_size=q.shape[2] // k.shape[2],
            scale=float(self.scale),
            bias=unread if bias is None else bias.float().contiguous(),
            bias_length=0 if bias is None else bias.shape[1],
            is_hidden=unread if is_hidden is None else is_hidden.contiguous().view(torch.uint8),
            dropout_p=float(self.dropout_p),
            seed=self.seed | 1,  # never divisible by 16, so that no seed needs another compilation
        )
        return _Setup(schedule, problem, kinds)

    def _results(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Makes what the forward pass writes: out (b, n, h, d) and lse (b, n, h)."""
        lse = self._result(q[..., 0], dtype=torch.float32, fill=float("-inf"))
        return self._result(q, dtype=self.out_dtype), lse

    def _gradients(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Makes what the backward pass writes: the gradients of q, k and v."""
        # With xPos, factors come after the sums over the branches: only then is it time to round.
        sum_dtype = q.dtype if self.xpos_scale_base is None else torch.float32
        return (
            self._result(q, dtype=sum_dtype),
            self._result(k, dtype=sum_dtype),
            self._result(v),
        )

    def _result(self, x: Tensor, *, dtype: torch.dtype | None = None, fill: float = 0.0) -> Tensor:
        """Makes a contiguous result; `fill` stands where no sequence has a row."""
        num_tokens = sum(group.count * group.length for group in self.groups)
        result = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
        return result if num_tokens == x.shape[0] * x.shape[1] else result.fill_(fill)

    def _bias_gradient(self, inputs: tuple[Any, ...], setup: _Setup, *, num_heads: int) -> Tensor:
        """Returns the gradient of the table (h, 2m - 1)."""
        from .kernels.triton_bias import bias_gradient

        assert self.distance_bias is not None
        schedule, delta = setup.schedule, inputs[-1]
        grad = torch.zeros(self.distance_bias.shape, dtype=torch.float32, device=delta.device)
        longest = max((launch.max_length for launch in schedule.launches), default=1)
        for branch, (segment_length, rate) in enumerate(schedule.lengths):
            if branch == schedule.last and not schedule.attends:
                continue
            width = min(segment_length, longest)
            num_tiles = -(-width // (rate * _BAND_BLOCK))
            first = 1 - num_tiles
            num_bands = num_tiles if self.is_causal else 2 * num_tiles - 1
            # A band has at most a tile for each tile of rows of the longest sequence.
            num_shares = _BAND_PROGRAMMES // (num_bands * num_heads)
            num_shares = max(1, min(num_shares, num_tiles * -(-longest // width)))
            shape = (num_shares, num_heads, num_bands, _BAND_BLOCK, _BAND_BLOCK)
            bands = torch.empty(shape, dtype=torch.float32, device=delta.device)
            bias_gradient[num_bands, num_heads, num_shares](
                *inputs,
                bands,
                setup.problem,
                setup.kinds[branch],
                branch,
                len(schedule.sequences),
                first,
                BLOCK=_BAND_BLOCK,
            )
            _add_diagonals(grad, bands.sum(0), first, rate)
        return grad.to(self.distance_bias.dtype)


def _launch(
    kernel: Any,
    tensors: tuple[Any, ...],
    setup: _Setup,
    heads: range,
    block: str,
    *,
    group_size: int = 1,
) -> None:
    """Runs a kernel over some heads, branch by branch; the last branch merges the others.

    The last branch goes by groups of `group_size` heads, tiles by the size that `block` names.
    """
    for branch in range(setup.schedule.last):
        _launch_branch(kernel, tensors, setup, branch, heads.start, len(heads), block)
    num_groups = len(heads) // group_size
    _launch_branch(kernel, tensors, setup, setup.schedule.last, heads.start, num_groups, block)


def launch_last(kernel: Any, tensors: tuple[Any, ...], setup: _Setup, block: str) -> None:
    """Runs a kernel over all heads for the last branch only, whose partials are there."""
    num_heads = setup.problem.num_heads
    _launch_branch(kernel, tensors, setup, setup.schedule.last, 0, num_heads, block)


def _launch_branch(
    kernel: Any,
    tensors: tuple[Any, ...],
    setup: _Setup,
    branch: int,
    first_head: int,
    num_heads: int,
    block: str,
) -> None:
    from .kernels.triton_tuning import sort_of

    schedule = setup.schedule
    for launch in schedule.launches:
        sort = sort_of(setup.kinds[branch], schedule.segment_rows(branch, launch.max_length))

        def grid(
            meta: dict[str, Any],
            length: int = launch.max_length,
            count: int = launch.count,
        ) -> tuple[int, int, int]:
            return schedule.num_tiles(branch, length, meta[block]), num_heads, count

        kernel[grid](
            *tensors,
            setup.problem_from(launch.first),
            setup.kinds[branch],
            first_head,
            schedule.num_partials,
            branch,
            SORT=sort,
        )


def kernel_rows(x: Tensor) -> Any:
    """What the kernels take for a tensor (b, n, h, d) of any strides but the last."""
    from .kernels.triton_parts import Rows

    return Rows(x, *x.stride()[:3])


def _passes(q: Tensor, num_partials: int, *, num_values: int, group_size: int) -> Iterator[range]:
    """Splits the heads so that the partials of each part are small."""
    num_heads = q.shape[2]
    fitting = _PASS_BYTES // max(1, 4 * num_values * num_partials)
    size = max(1, min(num_heads, fitting) // group_size) * group_size
    for start in range(0, num_heads, size):
        yield range(start, min(start + size, num_heads))


def _partials(q: Tensor, heads: range, *shape: int) -> Tensor:
    return torch.empty((len(heads), *shape), dtype=torch.float32, device=q.device)


def _deltas(out_grad: Tensor, out: Tensor, lse_grad: Tensor | None, setup: _Setup) -> Tensor:
    """Returns rowsum(out_grad * out) - lse_grad, (b, n, h) float32."""
    from .kernels.triton_backward import row_deltas

    batch, seq_len, num_heads, _ = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    row_deltas[batch * -(-seq_len // _DELTA_BLOCK), num_heads](
        kernel_rows(out_grad),
        out,
        delta if lse_grad is None else lse_grad.float().contiguous(),
        delta,
        setup.problem,
        setup.kinds[-1],
        HAS_LSE_GRAD=lse_grad is not None,
        BLOCK_M=_DELTA_BLOCK,
    )
    return delta


def _add_diagonals(grad: Tensor, bands: Tensor, first_band: int, rate: int) -> None:
    """Adds tiles (h, bands, B, B) to the table (h, 2m - 1) of the distances on their diagonals."""
    num_heads, num_bands, block, _ = bands.shape
    # Reversed rows, each shifted by one more place: what lies on a diagonal comes to one column.
    skewed = pad(bands.flip(2), (0, block)).flatten(2)[..., : block * (2 * block - 1)]
    sums = pad(skewed.unflatten(2, (block, 2 * block - 1)).sum(2), (0, 1))
    # Neighbouring bands share diagonals.
    line = sums.new_zeros(num_heads, num_bands + 1, block)
    line[:, :-1] += sums[..., :block]
    line[:, 1:] += sums[..., block:]
    # Distances beyond the table belong to pairs of rows that do not exist.
    lowest, middle = (first_band - 1) * block + 1, grad.shape[1] // 2
    first, last = max(lowest, -(middle // rate)), min(lowest + line[0].numel() - 1, middle // rate)
    places = slice(middle + first * rate, middle + last * rate + 1, rate)
    grad[:, places] += line.flatten(1)[:, first - lowest : last - lowest + 1]


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
