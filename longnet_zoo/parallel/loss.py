"""The loss over all tokens of all processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from longnet_zoo.ops.cross_entropy import Reduction, linear_cross_entropy

from .collectives import all_reduced, all_sum

__all__ = ["ParallelCrossEntropy"]


class ParallelCrossEntropy:
    """`linear_cross_entropy` of tokens of which each process has some.

    `"mean"` is over the labelled tokens of all processes, `"sum"` over their losses: the same
    number on each. `"none"` gives the losses of this process's tokens.

    Args:
        group: The processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group_name = group.group_name

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelCrossEntropy:
        """Serves copies of a model as well: processes are not copied."""
        return self

    def __call__(
        self,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        chunk_size: int | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Computes the loss; see `linear_cross_entropy`."""
        local: Reduction = "sum" if reduction == "mean" else reduction
        loss = linear_cross_entropy(
            features,
            weight,
            labels,
            bias=bias,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
            reduction=local,
        )
        if reduction == "none":
            return loss
        total = all_sum(loss, self._group_name)
        if reduction == "sum":
            return total
        count = all_reduced((labels != ignore_index).sum(), self._group_name)
        return total / count.clamp(min=1)
