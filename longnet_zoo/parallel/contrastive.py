"""The contrastive loss of the pairs of all processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from longnet_zoo.ops.contrastive import ContrastiveKind, check_pairs, sum_of_rows

from .collectives import all_sum, group_named
from .layout import gather_rows, join_rows

__all__ = ["ParallelContrastiveLoss"]


class ParallelContrastiveLoss:
    """`contrastive_loss` of all pairs, of which each process has some, however many.

    Each process compares its own images with the texts of all, and for "softmax" its own texts with
    the images of all. All return the same loss, that of one process with all pairs; the gradient
    of a parameter is the mean over the processes of what each of them finds, as DDP, FSDP2 and
    Lightning compute it. Labels, where there are some, must mean the same on all processes.

    Args:
        group: The processes.

    Example:
        >>> model.contrastive_loss_op = ParallelContrastiveLoss(dist.group.WORLD)
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        # By name: a group that is kept beyond its end can abort the process at its exit.
        self._group_name = group.group_name

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelContrastiveLoss:
        """Serves copies of a model as well: processes are not copied."""
        return self

    # How many pairs the others have is read, which no graph can hold.
    @torch.compiler.disable(recursive=False)
    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        scale: Tensor | float,
        *,
        bias: Tensor | float | None = None,
        kind: ContrastiveKind = "softmax",
        labels: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Computes the loss; see `contrastive_loss`.

        Raises:
            ValueError: On all processes, if their channels differ or only some pass labels.
        """
        check_pairs(image_features, text_features, bias, kind, labels, chunk_size)
        counts = self._counts(image_features, labels)
        gather = partial(self._gather, counts=counts)
        if labels is None:
            rank = dist.get_rank(group_named(self._group_name))
            every_label = torch.arange(sum(counts), device=image_features.device)
            labels = every_label.split(counts)[rank]
        else:
            every_label = gather(labels)
        rows = partial(sum_of_rows, kind=kind, scale=scale, bias=bias, chunk_size=chunk_size)
        total = rows(image_features, gather(text_features), labels, every_label)
        if kind == "softmax":
            total = (total + rows(text_features, gather(image_features), labels, every_label)) / 2
        return all_sum(total, self._group_name) / sum(counts)

    def _counts(self, features: Tensor, labels: Tensor | None) -> list[int]:
        """How many pairs each process has."""
        mine = torch.tensor([[*features.shape, int(labels is not None)]], device=features.device)
        size = group_named(self._group_name).size()
        counts, channels, labelled = gather_rows(mine, self._group_name, size).T.tolist()
        if len(set(channels)) > 1 or len(set(labelled)) > 1:
            raise ValueError(
                "all processes must pass features of the same channels, and all or none must pass "
                f"labels, got the channels {channels} and labels on {sum(labelled)} of {size}."
            )
        return counts

    def _gather(self, x: Tensor, counts: list[int]) -> Tensor:
        """Joins the rows of all processes; the gradient of mine is the sum of what all want."""
        most = max(counts)
        filled = pad(x, (*[0] * (2 * x.ndim - 1), most - len(x)))
        parts = join_rows(filled, self._group_name, len(counts)).split(most)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
