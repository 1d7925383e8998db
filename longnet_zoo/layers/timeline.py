"""One sequence out of several: tokens of all modalities in the order of their times.

A dilated segment of the merged sequence is then one window of time in all modalities, whatever
their rates. Tokens without a time come first, in the order of the modalities; tokens of one time
follow each other in that order, too. Padding goes to the end, so a padded sequence equals itself
without padding.

Shape legend: b batch, n tokens of all modalities, n_m those of modality m, h heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longnet_zoo.ops.arguments import can_read
from longnet_zoo.ops.positions import float64_device

__all__ = ["Timeline", "as_rows"]


@dataclass(frozen=True, eq=False)
class Timeline:
    """Where each token is in the merged sequence; make one by `merge`.

    "Stored" order is modality after modality, "merged" order that of time.

    Attributes:
        lengths: Tokens of each modality by name, in the order of the modalities.
        positions: Rotary positions in stored order, float64 (b or 1, n).
        order: Stored place of each merged token, (b or 1, n); None: both orders are the same.
        inverse: Merged place of each stored token.
        is_padding: Bool (b, n) in merged order, True = padding, which is last; None: no padding.
        padding_masks: Bool (b, n_m) of the modalities that have some, True = padding.
    """

    lengths: dict[str, int]
    positions: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None
    is_padding: Tensor | None = None
    padding_masks: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def merge(
        cls,
        inputs: Mapping[str, Tensor],
        *,
        times: Mapping[str, Tensor],
        padding_masks: Mapping[str, Tensor],
        time_rate: float,
    ) -> Timeline:
        """Merges modalities.

        Tokens with a time have the rotary position `time_rate` * (time - the first time of their
        sample), so the origin of time does not matter; the others have those before 0.

        Args:
            inputs: Tokens of each modality, (b, n_m, ...), in the order of the modalities.
            times: Times of those that have one, (b or 1, n_m); see `as_rows`.
            padding_masks: Bool (b, n_m) each, True = padding; absent: none.
            time_rate: Rotary positions per unit of time.

        Raises:
            ValueError: If the time of a token that is no padding is not finite.
        """
        lengths = {name: x.shape[1] for name, x in inputs.items()}
        first = next(iter(inputs.values()))
        if not times and not padding_masks:
            total = sum(lengths.values())
            device = float64_device(first.device)
            positions = torch.arange(-total, 0, device=device, dtype=torch.float64)[None]
            return cls(lengths, positions)
        is_padding = _joined_masks(inputs, padding_masks) if padding_masks else None
        stored, is_timed = _joined_times(inputs, times)
        is_real = torch.ones_like(is_timed) if is_padding is None else ~is_padding.to(stored.device)
        _check_times(stored, is_timed & is_real)
        # Without a time first, padding last.
        keys = torch.where(is_timed, stored, -torch.inf)
        keys = torch.where(is_real, keys, torch.inf)
        order = keys.argsort(dim=1, stable=True).to(first.device)
        if is_padding is not None:
            is_padding = is_padding.gather(1, order)
        positions = _rotary_positions(keys, time_rate)
        return cls(lengths, positions, order, order.argsort(dim=1), is_padding, dict(padding_masks))

    def merged(self, x: Tensor) -> Tensor:
        """Brings tokens (b, n, h, d) from stored to merged order."""
        return x if self.order is None else _taken(x, self.order)

    def stored(self, x: Tensor) -> Tensor:
        """Brings tokens (b, n, h, d) from merged to stored order."""
        return x if self.inverse is None else _taken(x, self.inverse)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Cuts tokens in stored order, (b, n, ...), into those of each modality."""
        parts = x.split(list(self.lengths.values()), dim=1)
        return dict(zip(self.lengths, parts, strict=True))


def as_rows(name: str, times: Tensor, *, batch: int, length: int) -> Tensor:
    """Makes times (n_m,) or (b or 1, n_m) two-dimensional.

    Args:
        name: The modality, for errors.
        times: Its times.
        batch: Samples.
        length: Its tokens, n_m.

    Raises:
        TypeError: If times are no tensor of numbers.
        ValueError: If they are of another shape.
    """
    if not isinstance(times, Tensor) or times.dtype == torch.bool or times.is_complex():
        kind = times.dtype if isinstance(times, Tensor) else type(times).__name__
        raise TypeError(f"times of {name!r} must be a tensor of real numbers, got {kind}.")
    rows = times[None] if times.ndim == 1 else times
    if rows.ndim != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] != length:
        raise ValueError(
            f"times of {name!r} must be ({length},) or ({batch} or 1, {length}), one per token, "
            f"got {tuple(times.shape)}."
        )
    return rows


def _joined_masks(inputs: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(
        [
            masks[name] if name in masks else x.new_zeros(x.shape[:2], dtype=torch.bool)
            for name, x in inputs.items()
        ],
        dim=1,
    )


def _joined_times(
    inputs: Mapping[str, Tensor], times: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Times in stored order, float64 (b or 1, n), and whether a token has one, bool (1, n)."""
    rows = max([1, *(len(times[name]) for name in inputs if name in times)])
    device = float64_device(next(iter(inputs.values())).device)
    parts, are_timed = [], []
    for name, x in inputs.items():
        own = torch.zeros(1, x.shape[1], device=device, dtype=torch.float64)
        own = times[name].to(device, torch.float64) if name in times else own
        parts.append(own.expand(rows, -1))
        are_timed.append(torch.full((1, x.shape[1]), name in times, device=device))
    return torch.cat(parts, dim=1), torch.cat(are_timed, dim=1)


def _check_times(stored: Tensor, is_used: Tensor) -> None:
    if not can_read(stored):
        return
    is_bad = ~stored.isfinite() & is_used
    if is_bad.any():
        row, place = is_bad.nonzero()[0].tolist()
        got = stored.expand(is_bad.shape)[row, place].item()
        raise ValueError(
            f"times must be finite, got {got} in row {row} at place {place} of the tokens of all "
            "modalities. Mark tokens that do not exist as padding."
        )


def _rotary_positions(keys: Tensor, time_rate: float) -> Tensor:
    is_timed, is_first = keys.isfinite(), keys == -torch.inf
    start = torch.where(is_timed, keys, torch.inf).amin(dim=1, keepdim=True)
    before = is_first.cumsum(dim=1) - is_first.sum(dim=1, keepdim=True) - 1
    positions = torch.where(is_timed, (keys - start) * time_rate, before.to(keys.dtype))
    return torch.where(is_timed | is_first, positions, 0.0)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    if len(places) == 1:
        return x.index_select(1, places[0])
    batch, seq_len = places.shape
    rows = torch.arange(batch, device=x.device)[:, None] * seq_len + places
    return x.flatten(0, 1).index_select(0, rows.flatten()).view_as(x)
