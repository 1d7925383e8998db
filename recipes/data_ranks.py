"""Which share of the data a process takes, also where several processes share each sample."""

from typing import Any

import lightning as L

__all__ = ["counts_samples", "data_rank"]


def data_rank(trainer: L.Trainer | None) -> tuple[int, int]:
    """Returns which share of the data this process takes, and of how many.

    These are the rank and the number of processes, unless some of them share the parts of a model
    or of a sequence: they take the same data.

    Args:
        trainer: The trainer; None where there is none yet.
    """
    options: dict[str, Any] = getattr(trainer, "distributed_sampler_kwargs", None) or {}
    return options.get("rank", 0), options.get("num_replicas", 1)


def counts_samples(trainer: L.Trainer) -> bool:
    """Returns whether this process is the one, of those with the same data, that counts it."""
    mesh = getattr(trainer.strategy, "sequence_mesh", None)
    return mesh is None or mesh.get_local_rank() == 0
