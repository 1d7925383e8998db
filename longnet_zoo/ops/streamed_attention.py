"""One attention layer of a stream: it attends from new tokens to what it keeps, and keeps them.

Shape legend: b batch, n new tokens, h num_heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .arguments import check_arguments
from .custom_op import Options
from .dilated_attention import DistanceBias, checked_options, dilated_attention
from .joint_softmax import JointSoftmax, Piece
from .kept_keys import KeptKeys, Rows
from .kernels import choose_kernel, triton
from .pattern import DilatedPattern
from .positions import check_xpos_range
from .schedule import view_rows
from .sequences import SequenceGroup

__all__ = ["LayerKeys", "Stretch"]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """New tokens that one call of the layers reads.

    Attributes:
        rows: Rows of the batch they belong to.
        starts: Position of the first new token of each of these rows.
        length: New tokens of each row. Rows that stand at different positions have one each.
    """

    rows: list[int]
    starts: list[int]
    length: int

    @property
    def is_step(self) -> bool:
        """Whether there is one token of each row: rows then go side by side, (1, b, ...)."""
        return self.length == 1


class LayerKeys:
    """What one attention layer keeps, made when its first tokens show their shape.

    The attribute `has_changed` becomes True when something is written; whoever cares sets it back.

    Args:
        pattern: The schedule.
        batch_size: Rows of the batch.
    """

    def __init__(self, pattern: DilatedPattern, batch_size: int) -> None:
        self.pattern = pattern
        self.batch_size = batch_size
        self.branches: list[KeptKeys] = []
        self.has_changed = False
        self._made_for: dict[str, Any] = {}

    def reorder(self, rows: Tensor) -> None:
        """Takes these rows of the batch, which may repeat."""
        self.batch_size = len(rows)
        for keys in self.branches:
            keys.reorder(rows)

    # A graph would be for one position.
    @torch.compiler.disable
    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: DilatedPattern,
        *,
        stretch: Stretch,
        is_causal: bool,
        bias: DistanceBias | None,
        xpos_scale_base: float | None,
        dropout_p: float,
        backend: str,
        key_padding_mask: None = None,
        cu_seqlens: None = None,
    ) -> Tensor:
        """Attends to what is kept and to the new tokens, and keeps these."""
        if pattern != self.pattern or not is_causal:
            raise ValueError(
                f"the cache is for causal layers with {self.pattern}, got one with {pattern} and "
                f"is_causal={is_causal}. Make it with model.make_cache()."
            )
        if dropout_p:
            raise ValueError(
                f"a stream has no attention dropout, got dropout_p={dropout_p}. Call model.eval()."
            )
        check_arguments(q, k, v, pattern, bias, None, None, 0.0, backend)
        self._make_branches(q, k, xpos_scale_base)
        with torch.autocast(q.device.type, enabled=False):
            if stretch.is_step:
                return self._attend_step(q, k, v, stretch, bias, xpos_scale_base)
            return self._attend_stretch(q, k, v, stretch, bias, xpos_scale_base, backend)

    def _make_branches(self, q: Tensor, k: Tensor, xpos_scale_base: float | None) -> None:
        """Makes what is kept, by the first tokens; checks that later ones are alike."""
        asked = {
            "dtype": k.dtype,
            "device": k.device,
            "heads": (q.shape[2], k.shape[2]),
            "head_dim": k.shape[3],
            "xpos_scale_base": xpos_scale_base,
        }
        if self.branches:
            other = {name: x for name, x in asked.items() if x != self._made_for[name]}
            if other:
                kept = {name: self._made_for[name] for name in other}
                raise ValueError(
                    f"a cache goes on as it began, with {kept}, got {other}. Call cache.reset(), "
                    "and read all with the same model, device and autocast."
                )
            return
        self._made_for = asked
        self.branches = [
            KeptKeys(
                self.pattern,
                branch,
                q,
                k,
                batch_size=self.batch_size,
                xpos_scale_base=xpos_scale_base,
            )
            for branch in range(len(self.pattern.branches))
        ]

    def _attend_step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stretch: Stretch,
        bias: DistanceBias | None,
        xpos_scale_base: float | None,
    ) -> Tensor:
        """Attends from one token of each row, (1, b, h, d)."""
        if xpos_scale_base is not None:
            check_xpos_range(
                span=min(self.pattern.segment_lengths[-1], max(stretch.starts) + 1),
                head_dim=q.shape[3],
                scale_base=xpos_scale_base,
                is_causal=True,
                dtype=q.dtype,
            )
        q, k, v = q[0], k[0], v[0]
        out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = out.new_full(q.shape[:2], float("-inf"))
        self.has_changed = True
        for keys in self.branches:
            keys.join_step(
                q,
                k,
                v,
                out,
                lse,
                rows=stretch.rows,
                positions=stretch.starts,
                scale=q.shape[2] ** -0.5,
                bias=bias,
            )
        return out.to(v.dtype).unsqueeze(0)

    def _attend_stretch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stretch: Stretch,
        bias: DistanceBias | None,
        xpos_scale_base: float | None,
        backend: str,
    ) -> Tensor:
        """Attends from tokens that follow each other, (b, n, h, d), at the same place in rows."""
        start, length = stretch.starts[0], stretch.length
        shared: dict[str, Any] = {"bias": bias, "xpos_scale_base": xpos_scale_base}
        if all(start % segment_length == 0 for segment_length in self.pattern.segment_lengths):
            # Nothing before can be seen, and the best kernel serves.
            out = dilated_attention(
                q, k, v, self.pattern, is_causal=True, backend=backend, **shared
            )
        else:
            options = checked_options(
                q,
                k,
                v,
                self.pattern,
                is_causal=True,
                scale=None,
                key_padding_mask=None,
                cu_seqlens=None,
                dropout_p=0.0,
                backend=backend,
                return_lse=False,
                seed=None,
                seq_len=start + length,
                **shared,
            )
            out, _ = self._problem(q, options, stretch).forward(q, k, v)
        self.has_changed = True
        for keys in self.branches:
            keys.append(self._rows(stretch), k, v, start)
        return out

    def _problem(self, q: Tensor, options: Options, stretch: Stretch) -> _StreamedSoftmax:
        start, length = stretch.starts[0], stretch.length
        call = options.call(q, has_hidden_keys=False)
        # Triton's kernels serve whole sequences: what was kept goes to another one.
        backend = "auto" if options.backend == triton.NAME else options.backend
        return _StreamedSoftmax(
            pattern=self.pattern,
            kernel=choose_kernel(backend, replace(call, is_block=True)),
            groups=[
                SequenceGroup(
                    is_packed=False,
                    first=0,
                    count=len(q),
                    length=length,
                    start=start,
                    whole_length=start + length,
                )
            ],
            is_causal=True,
            scale=options.scale,
            xpos_scale_base=options.xpos_scale_base,
            is_hidden=None,
            dense_bias=None,
            distance_bias=options.distance_bias,
            dropout_p=0.0,
            seed=0,
            rows=self._rows(stretch),
            branches=self.branches,
        )

    def _rows(self, stretch: Stretch) -> Rows:
        return slice(None) if len(stretch.rows) == self.batch_size else stretch.rows


@dataclass(frozen=True, kw_only=True)
class _StreamedSoftmax(JointSoftmax):
    """Attention of new tokens to themselves and to what is kept.

    Attributes:
        rows: Rows of the batch that the tokens belong to.
        branches: What is kept of each branch.
    """

    rows: Rows
    branches: list[KeptKeys]

    def _pieces(
        self,
        query_tensors: list[Tensor],
        kv_tensors: list[Tensor],
        bias_grad: Tensor | None = None,
    ) -> Iterator[Piece]:
        yield from super()._pieces(query_tensors, kv_tensors, bias_grad)
        num_heads, num_kv_heads = query_tensors[0].shape[2], kv_tensors[0].shape[2]
        calls = count()
        for group in self.groups:
            for block in self._blocks(group, num_heads, num_kv_heads):
                if block.num_before:
                    keys = self.branches[block.branch]
                    views = [view_rows(group.select(x), block) for x in query_tensors]
                    kept = keys.kept(self.rows, block.heads, block.num_before)
                    views += [x.unsqueeze(1) for x in kept]
                    yield from self._other_pieces(block, views, calls, first_key=0)

    # Kept keys have a factor of their own branch, so queries and new keys get the like.

    def _decay_all(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def _decay_block(self, q_rows: Tensor, k_rows: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        if self.xpos_scale_base is None:
            return q_rows, k_rows
        keys, first = self.branches[piece.block.branch], piece.block.num_before
        q_rows = (q_rows * keys.xpos_factors(first, q_rows)).to(q_rows.dtype)
        if piece.is_own:
            k_rows = (k_rows / keys.xpos_factors(first, k_rows)).to(k_rows.dtype)
        return q_rows, k_rows
