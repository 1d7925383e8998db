"""Samples of a batch that lack modalities: each set of modalities is a batch of its own.

Nothing is computed for what is missing, and what its places hold, NaN included, is never read. The
samples with the same modalities are to the bit what they are as a batch by themselves, in a network
that never had the others.

Shape legend: b batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Samples", "check_known", "check_presence", "own_masks", "run_grouped", "take_part"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Samples with the same modalities.

    Attributes:
        inputs: Input of each modality that they have, (b, ...), in the order of the modalities.
        times: Times of those that have one, (b or 1, ...).
        padding_masks: Padding of those that have some, (b, ...).
    """

    inputs: dict[str, Tensor]
    times: dict[str, Tensor]
    padding_masks: dict[str, Tensor]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))

    def taken(self, rows: Tensor, names: Sequence[str]) -> Samples:
        """Takes some samples and some of their modalities."""
        inputs = {name: self.inputs[name].index_select(0, rows) for name in names}
        times = {name: x for name, x in self.times.items() if name in inputs}
        masks = {name: x for name, x in self.padding_masks.items() if name in inputs}
        return Samples(
            inputs=inputs,
            times={k: x if len(x) == 1 else x.index_select(0, rows) for k, x in times.items()},
            padding_masks={name: x.index_select(0, rows) for name, x in masks.items()},
        )


def check_presence(
    inputs: Mapping[str, Tensor | None],
    present: Mapping[str, Tensor | Sequence[bool]] | None,
    *,
    names: Sequence[str],
) -> tuple[dict[str, Tensor], dict[str, list[bool]] | None]:
    """Checks which modalities there are.

    Args:
        inputs: Input of each modality, (b, ...); absent or None where nobody has it.
        present: Whether each sample has a modality, bool (b,); absent: all have what has an input.
        names: The modalities.

    Returns:
        The inputs that a sample has in the order of `names`, and the presence of each of them; None
        where all samples have all of these.

    Raises:
        ValueError: If a modality is unknown, batches differ, or a sample has no modality.
        TypeError: If `present` is not bool.
    """
    check_known("inputs", inputs, names)
    check_known("present", present, names)
    found = {name: x for name in names if (x := inputs.get(name)) is not None}
    if not found:
        raise ValueError(f"inputs must have at least one of {', '.join(names)}, got none.")
    sizes = {name: len(x) for name, x in found.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"inputs must have one batch size of at least 1, got {sizes}.")
    if present is None:
        return found, None
    batch = next(iter(sizes.values()))
    has = {name: _flags(name, values, batch) for name, values in present.items()}
    for name, flags in has.items():
        if name not in found and any(flags):
            raise ValueError(
                f"present says that samples have {name!r}, got no input of it. Pass one, or False."
            )
    has = {name: has.get(name, [True] * batch) for name in found}
    empty = [row for row in range(batch) if not any(flags[row] for flags in has.values())]
    if empty:
        raise ValueError(f"every sample needs a modality, got none for the samples {empty}.")
    # What nobody has is not even looked at, such as texts that are all empty.
    found = {name: x for name, x in found.items() if any(has[name])}
    has = {name: has[name] for name in found}
    return found, None if all(map(all, has.values())) else has


def check_known(argument: str, given: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    """Refuses what is given for a modality that does not exist; raises ValueError."""
    unknown = sorted(set(given or ()) - set(names))
    if unknown:
        raise ValueError(f"{argument} must be of the modalities {', '.join(names)}, got {unknown}.")


def own_masks(
    masks: Mapping[str, Tensor | None] | None,
    found: Mapping[str, Tensor],
    *,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Takes the padding masks of the inputs that are there, a row for each sample.

    Args:
        masks: Masks by modality, (b, ...); absent or None: no padding.
        found: The inputs that are there, (b, ...).
        names: The modalities.

    Raises:
        ValueError: If a modality is unknown, or a mask is of another batch.
    """
    check_known("padding_masks", masks, names)
    given = masks or {}
    own = {name: mask for name, mask in given.items() if mask is not None and name in found}
    for name, mask in own.items():
        if mask.shape[:1] != found[name].shape[:1]:
            raise ValueError(
                f"padding_masks[{name!r}] must have a row for each of the {len(found[name])} "
                f"samples, got {tuple(mask.shape)}."
            )
    return own


def run_grouped(
    run: Callable[[Samples], Mapping[str, Tensor]],
    samples: Samples,
    present: Mapping[str, Sequence[bool]] | None,
) -> dict[str, Tensor]:
    """Runs a function on the samples of each set of modalities, and joins what it returns.

    Args:
        run: Makes tensors by name, (b, ...), of samples that have all of their modalities.
        samples: All samples.
        present: Whether each sample has a modality; None: all have all.

    Returns:
        The tensors, (b, ...); 0 for samples for which `run` returned none of that name.
    """
    if present is None:
        return dict(run(samples))
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in range(samples.batch):
        own = tuple(name for name, flags in present.items() if flags[row])
        groups.setdefault(own, []).append(row)
    device = next(iter(samples.inputs.values())).device
    outs = [
        run(samples.taken(torch.tensor(rows, device=device), names))
        for names, rows in groups.items()
    ]
    places = torch.tensor([*chain(*groups.values())], device=device).argsort()
    joined = {}
    for name in dict.fromkeys(name for out in outs for name in out):
        example = next(out[name] for out in outs if name in out)
        parts = [
            out[name] if name in out else example.new_zeros(len(rows), *example.shape[1:])
            for out, rows in zip(outs, groups.values(), strict=True)
        ]
        joined[name] = torch.cat(parts).index_select(0, places)
    # In the order of the modalities, whoever has them first.
    order = {name: place for place, name in enumerate(samples.inputs)}
    return dict(sorted(joined.items(), key=lambda item: order.get(item[0], -1)))


def take_part(x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Lets parameters that were not used have gradients of zero where other processes wait.

    `DistributedDataParallel` waits for a gradient of every parameter. Nothing is added to `x`, and
    in a single process it is returned as it is: unused parameters then have no gradient.

    Args:
        x: An output, of any shape.
        parameters: The parameters that have no part in it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    unused = [parameter for parameter in parameters if parameter.requires_grad]
    if not unused or not torch.is_grad_enabled():
        return x
    return _TakePart.apply(x, *unused)


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.likes = [(tuple(p.shape), p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.likes)
        return grad, *zeros


def _flags(name: str, values: Tensor | Sequence[bool], batch: int) -> list[bool]:
    flags = values.tolist() if isinstance(values, Tensor) else list(values)
    if not isinstance(flags, list) or any(type(flag) is not bool for flag in flags):
        raise TypeError(f"present[{name!r}] must be bool (batch,), got {values!r}.")
    if len(flags) != batch:
        raise ValueError(f"present[{name!r}] must be bool ({batch},), got {len(flags)} values.")
    return flags
