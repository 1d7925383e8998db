"""Checks that processes which share a sequence pass what fits together.

Where they do not, one would wait for the other until the time-out, or compute something else.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_zoo.ops.arguments import can_read

from .layout import gather_rows

__all__ = ["check_alike"]


def check_alike(
    x: Tensor,
    group: dist.ProcessGroup,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Compares what the processes of a group pass; all of them must call it.

    Args:
        x: Sequences or parts of them, (batch, tokens, ...).
        group: The processes.
        key_padding_mask: Their padding; only whether there is a mask is compared.
        cu_seqlens: Boundaries of packed sequences, the same on all processes.

    Raises:
        ValueError: On all processes, if they differ; the message says in what.
    """
    if not can_read(x):
        return
    mine = {
        "batch size": x.shape[0],
        "number of tokens": x.shape[1],
        "key_padding_mask (1: one, 0: None)": int(key_padding_mask is not None),
        # Of integers, so the same on all processes.
        "cu_seqlens (0: None)": 0 if cu_seqlens is None else hash((*cu_seqlens.tolist(),)) % 2**31,
    }
    numbers = torch.tensor([list(mine.values())], device=x.device)
    everyone = gather_rows(numbers, group.group_name, group.size()).T.tolist()
    for name, values in zip(mine, everyone, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"all processes that share a sequence must pass the same {name}, got "
                f"{', '.join(map(str, values))}. shard_sequence and shard_padding_mask make parts "
                "that fit."
            )
