"""Multiway modules: one set of weights per modality, chosen token by token.

In a multiway Transformer (BEiT-3, arXiv 2208.10442; VLMo, arXiv 2111.02358) all tokens attend to
each other, but linear layers and norms differ between modalities. Which token takes which weights
is a `Route`, an argument of every call: modules keep no state between calls.

Shape legend: b batch, n seq_len.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["Multiway", "Route", "make_multiway", "run_routed"]


@dataclass(frozen=True, eq=False)
class Route:
    """The modality of every token; make one by `split` or `per_token`.

    Attributes:
        lengths: Number of tokens of each modality, in the order in which modules take them: per
            sequence for `split`, over the whole batch for `per_token`.
        order: Flat indices into (batch, seq_len) that sort tokens by modality; None if they are
            sorted in every sequence.
        inverse: The permutation that undoes `order`.
        shape: The (batch, seq_len) that `order` is for.
        is_part: Whether other processes have the rest of the sequences. A modality that no token
            has here then takes part all the same, with gradients of zero: others wait for them.
    """

    lengths: tuple[int, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None
    shape: tuple[int, int] | None = None
    is_part: bool = False

    @classmethod
    def split(cls, *lengths: int) -> Route:
        """Makes the route of sequences that begin with all tokens of modality 0, then 1, ...

        Args:
            *lengths: Number of tokens of each modality in every sequence; 0 for none.

        Raises:
            ValueError: If a length is negative, or there is no token at all.
            TypeError: If a length is not an integer.
        """
        # While a program is exported, a length may be a symbol.
        if not all(isinstance(length, (int, torch.SymInt)) for length in lengths):
            raise TypeError(f"lengths must be integers, one per modality, got {lengths}.")
        if not any(lengths) or min(lengths) < 0:
            raise ValueError(
                f"lengths must be 0 or more, one per modality, and one of them above 0, got "
                f"{lengths}."
            )
        return cls(lengths)

    @classmethod
    def per_token(cls, modalities: Tensor, *, num_modalities: int) -> Route:
        """Makes the route of sequences whose modalities are mixed in any order.

        Args:
            modalities: Modality of each token, int64 (batch, seq_len).
            num_modalities: Number of modalities.

        Raises:
            ValueError: If it is not (batch, seq_len), or a modality is out of range.
            TypeError: If `modalities` are not int64.
        """
        if modalities.dtype != torch.int64:
            raise TypeError(f"modalities must be int64, got {modalities.dtype}.")
        if modalities.ndim != 2 or modalities.numel() == 0:
            raise ValueError(f"modalities must be (batch, seq_len), got {tuple(modalities.shape)}.")
        lowest, highest = int(modalities.min()), int(modalities.max())
        if lowest < 0 or highest >= num_modalities:
            raise ValueError(
                f"modalities must be in [0, num_modalities) with num_modalities={num_modalities}, "
                f"got values from {lowest} to {highest}."
            )
        flat = modalities.flatten()
        order = flat.argsort(stable=True)
        lengths = flat.bincount(minlength=num_modalities).tolist()
        batch, seq_len = modalities.shape
        return cls(tuple(lengths), order, order.argsort(), (batch, seq_len))

    def parts(self, sizes: Sequence[int]) -> list[Route]:
        """Cuts the route into those of stretches of all sequences, of these lengths.

        Args:
            sizes: Tokens of each stretch. What they have beyond the sequences is padding, which
                takes the way of the last modality.
        """
        if self.order is not None and self.shape is not None:
            return self._parts_per_token(sizes)
        ends = [*accumulate(self.lengths[:-1], initial=0), sum(sizes)]
        return [
            Route(tuple(max(0, min(stop, b) - max(start, a)) for a, b in pairwise(ends)))
            for start, stop in pairwise(accumulate(sizes, initial=0))
        ]

    def _parts_per_token(self, sizes: Sequence[int]) -> list[Route]:
        assert self.order is not None
        assert self.shape is not None
        num_modalities = len(self.lengths)
        numbers = torch.arange(num_modalities, device=self.order.device)
        lengths = torch.tensor(self.lengths, device=self.order.device)
        modalities = torch.empty_like(self.order)
        modalities[self.order] = numbers.repeat_interleave(lengths)
        num_padding = sum(sizes) - self.shape[1]
        padded = pad(modalities.view(self.shape), (0, num_padding), value=num_modalities - 1)
        return [
            Route.per_token(part, num_modalities=num_modalities)
            for part in padded.split(list(sizes), dim=1)
        ]


class Multiway(nn.Module):
    """One module per modality, each for its own tokens.

    Args:
        make: Makes the module of one modality; it maps tokens one by one.
        num_modalities: Number of modalities, at least 2.

    Example:
        >>> linear = Multiway(lambda: nn.Linear(8, 16), num_modalities=2)
        >>> y = linear(torch.randn(2, 5, 8), Route.split(3, 2))
    """

    def __init__(self, make: Callable[[], nn.Module], *, num_modalities: int) -> None:
        super().__init__()
        if num_modalities < 2:
            raise ValueError(f"num_modalities must be at least 2, got {num_modalities}.")
        self.experts = nn.ModuleList(make() for _ in range(num_modalities))

    def forward(self, x: Tensor, route: Route | None) -> Tensor:
        """Maps tokens: (batch, seq_len, ...) to (batch, seq_len, ...).

        Args:
            x: Tokens, (batch, seq_len, ...).
            route: The modality of every token.

        Raises:
            ValueError: If there is no route, or it is for other tokens.
        """
        if route is None or len(route.lengths) != len(self.experts):
            got = "None" if route is None else f"one for {len(route.lengths)}"
            raise ValueError(f"route must be for {len(self.experts)} modalities, got {got}.")
        batch, seq_len = x.shape[:2]
        if route.order is None or route.inverse is None:
            if sum(route.lengths) != seq_len:
                raise ValueError(
                    f"route must have one length per modality that add up to seq_len={seq_len}, "
                    f"got {route.lengths}."
                )
            return self._run(x, route, dim=1)
        if route.shape != (batch, seq_len):
            raise ValueError(
                f"route must be for (batch, seq_len)={(batch, seq_len)}, got one for {route.shape}."
            )
        y = self._run(x.flatten(0, 1)[route.order], route, dim=0)
        return y[route.inverse].unflatten(0, (batch, seq_len))

    def _run(self, x: Tensor, route: Route, *, dim: int) -> Tensor:
        parts = zip(self.experts, x.split(route.lengths, dim), strict=True)
        outs = [expert(part) for expert, part in parts if route.is_part or part.shape[dim] > 0]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim)


def make_multiway(make: Callable[[], nn.Module], num_modalities: int) -> nn.Module:
    """Makes a `Multiway` module, or for a single modality the plain one."""
    return make() if num_modalities == 1 else Multiway(make, num_modalities=num_modalities)


def run_routed(module: nn.Module, x: Tensor, route: Route | None) -> Tensor:
    """Calls a module that may be multiway: (batch, seq_len, ...) to (batch, seq_len, ...)."""
    return module(x, route) if isinstance(module, Multiway) else module(x)
