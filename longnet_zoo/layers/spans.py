"""Cutting a batch along the sequence: what a block gets beside the tokens, for some tokens only.

Shape legend: b batch, n seq_len, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from .attention import AttentionOp
from .multiway import Route

__all__ = ["Surroundings", "independent_spans", "split_route"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Surroundings:
    """What attention is called with beside the tokens; see `DilatedAttention.forward`.

    Attributes:
        rotary: Cosine and sine at the positions of the tokens, (n, d / 2) each.
        position_bias: Bias module that layers share.
        key_padding_mask: Bool (b, n), True = padding.
        cu_seqlens: Boundaries of packed sequences, int32 (num_sequences + 1,).
        route: The modality of every token.
        attention_op: Op of this call alone.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    position_bias: nn.Module | None = None
    key_padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    route: Route | None = None
    attention_op: AttentionOp | None = None

    def split(
        self, x: Tensor, *, segment_length: int, min_length: int
    ) -> list[tuple[Tensor, Surroundings]]:
        """Cuts tokens, and this with them, where no attention crosses.

        Args:
            x: Tokens, (b, n, e).
            segment_length: As for `independent_spans`.
            min_length: As for `independent_spans`.

        Returns:
            Tokens of each span and what surrounds them; all in one if something does not fit, so
            that attention sees it and says what is wrong.
        """
        bounds = self._bounds(x)
        if bounds is None:
            return [(x, self)]
        spans = independent_spans(bounds, segment_length=segment_length, min_length=min_length)
        if len(spans) == 1:
            return [(x, self)]
        lengths = [span[-1] - span[0] for span in spans]
        routes = split_route(self.route, lengths)
        parts = [self._part(span, route) for span, route in zip(spans, routes, strict=True)]
        return list(zip(x.split(lengths, dim=1), parts, strict=True))

    def _part(self, span: list[int], route: Route | None) -> Surroundings:
        rows = slice(span[0], span[-1])
        mask, cu_seqlens = self.key_padding_mask, self.cu_seqlens
        return replace(
            self,
            rotary=None if self.rotary is None else (self.rotary[0][rows], self.rotary[1][rows]),
            key_padding_mask=None if mask is None else mask[:, rows],
            cu_seqlens=(
                None
                if cu_seqlens is None
                else cu_seqlens.new_tensor([bound - span[0] for bound in span])
            ),
            route=route,
        )

    def _bounds(self, x: Tensor) -> list[int] | None:
        """Returns the boundaries of the sequences; None if something does not fit the tokens."""
        seq_len = x.shape[1]
        mask, cu_seqlens = self.key_padding_mask, self.cu_seqlens
        if mask is not None and mask.shape != x.shape[:2]:
            return None
        if self.rotary is not None and any(len(table) != seq_len for table in self.rotary):
            return None
        if cu_seqlens is None:
            return [0, seq_len]
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
            return None
        bounds = cu_seqlens.tolist()
        is_rising = bounds == sorted({0, seq_len, *bounds})
        return bounds if is_rising else None


def independent_spans(
    bounds: Sequence[int], *, segment_length: int, min_length: int
) -> list[list[int]]:
    """Cuts sequences where no attention crosses, into spans of about equal length.

    Attention stays inside the segments of the longest branch if all others nest in these, and a
    sequence that begins at a segment has the same segments as before.

    Args:
        bounds: Boundaries of the sequences, rising: (0, seq_len) for one.
        segment_length: Tokens per segment of the longest branch.
        min_length: Tokens in a span, at least; the last one may have fewer.

    Returns:
        The boundaries of the sequences in each span, whose ends are the first and the last.
    """
    cuts = [cut for start, stop in pairwise(bounds) for cut in range(start, stop, segment_length)]
    spans, span = [], [bounds[0]]
    for cut in [*cuts[1:], bounds[-1]]:
        span.append(cut)
        if cut - span[0] >= min_length or cut == bounds[-1]:
            spans.append(span)
            span = [cut]
    return spans


def split_route(route: Route | None, sizes: Sequence[int]) -> list[Route | None]:
    """Cuts a route into those of stretches of all sequences, of these lengths."""
    if route is None or len(sizes) == 1:
        return [route] * len(sizes)
    return [replace(part, is_part=route.is_part) for part in route.parts(sizes)]
