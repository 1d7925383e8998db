"""The tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .associative_recall import AssociativeRecall
from .listops import ListOps
from .passkey import Passkey
from .pathfinder import Pathfinder
from .selective_copying import SelectiveCopying
from .task import Task

__all__ = ["TASKS", "make_task"]

TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (AssociativeRecall, ListOps, Passkey, Pathfinder, SelectiveCopying)
}


def make_task(name: str, *, seq_len: int | None = None, **options: Any) -> Task:
    """Makes a task.

    Args:
        name: One of `TASKS`.
        seq_len: Tokens of an example; None: as usual for the task.
        **options: Its other options.

    Raises:
        ValueError: There is no such task, or an option has a bad value.
        TypeError: There is no such option, or it is of the wrong type.

    Example:
        >>> task = make_task("mqar", seq_len=256, num_pairs=16)
        >>> batch = task.batch(range(8), split="train")
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}.")
    known = [field.name for field in fields(TASKS[name])]
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"{name} has no options {', '.join(unknown)}, it has {', '.join(known)}.")
    given = options if seq_len is None else {**options, "seq_len": seq_len}
    return TASKS[name](**given)
