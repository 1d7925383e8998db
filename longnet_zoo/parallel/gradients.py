"""Gradients that are means over processes, whose collectives all have their exact adjoint.

Every process computes the same loss from what all of them have, so the gradient of a parameter is
the mean over the processes of what each of them finds.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .collectives import all_reduced, group_named

__all__ = ["GradientAverager", "with_mean_gradient"]


def with_mean_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns what is the same on all processes; its gradient becomes the mean over them."""
    return _WithMeanGradient.apply(x, group)


class GradientAverager:
    """Lets every backward pass average the gradients of a model's parameters over processes.

    Called before every forward pass, as a hook of a module inside of the model: parameters that
    were unfrozen, added or replaced meanwhile are averaged, too. Gradients that add up over several
    passes are averaged once each. Those of parameters that FSDP2 shards are left to it.

    Args:
        model: Whose parameters.
        group: The processes.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        # By name: a group that is kept beyond its end can abort the process at its exit.
        self._model, self._group_name = model, group.group_name
        self._known = WeakTensorKeyDictionary()

    def __call__(self, *_: Any) -> None:
        """Takes over the parameters that are new.

        Raises:
            ValueError: If FSDP2 averages gradients over other processes only.
        """
        if torch.compiler.is_compiling():
            return
        for name, parameter in self._model.named_parameters():
            if isinstance(parameter, DTensor):
                self._check_sharded(name, parameter)
            elif parameter.requires_grad and parameter not in self._known:
                self._known[parameter] = parameter.register_hook(self._average)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientAverager:
        """Copies with the model, for the same processes."""
        return GradientAverager(deepcopy(self._model, memo), group_named(self._group_name))

    def _average(self, grad: Tensor) -> Tensor:
        return _mean(grad, group_named(self._group_name))

    def _check_sharded(self, name: str, parameter: DTensor) -> None:
        averaged = set(parameter.device_mesh.mesh.flatten().tolist())
        group = group_named(self._group_name)
        missing = set(dist.get_process_group_ranks(group)) - averaged
        if missing:
            raise ValueError(
                "FSDP2 must average gradients over the processes that share a sequence as well, "
                f"got {name} sharded over the ranks {sorted(averaged)} without {sorted(missing)}. "
                "Call fully_shard with a mesh of data and sequence: mesh[data, sequence]._flatten()"
                ", or all ranks."
            )


class _WithMeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group_name = group.group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mean(grad, group_named(ctx.group_name)), None


def _mean(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Half types travel as float32.
    total = all_reduced(grad.to(torch.promote_types(grad.dtype, torch.float32)), group.group_name)
    return (total / group.size()).to(grad.dtype)
