"""What data modules have in common: the ranges of their options, and what their loaders take."""

from typing import Any

import lightning as L

from .data_ranks import data_rank

__all__ = ["check_fractions", "check_least", "check_on_error", "loader_options"]


def check_fractions(*, val_fraction: float, test_fraction: float) -> None:
    """Refuses shares that are held out and leave nothing.

    Raises:
        ValueError: One is not in [0, 1), or they sum to 1 or more.
    """
    for name, value in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            "val_fraction and test_fraction must leave something for training, got "
            f"{val_fraction} and {test_fraction}."
        )


def check_least(**options: tuple[int | None, int]) -> None:
    """Refuses numbers that are too small.

    Args:
        **options: Value and least value of each, by its name; a value may be None.

    Raises:
        ValueError: One is smaller.
    """
    for name, (value, least) in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}.")


def check_on_error(on_error: str) -> None:
    """Refuses what is not in `loader.OnError`.

    Raises:
        ValueError: It is something else.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}.")


def loader_options(data: L.LightningDataModule, *, is_shared: bool = True) -> dict[str, Any]:
    """Returns what every loader takes: this process's share, workers and memory.

    Args:
        data: Has a trainer or none, and `num_workers`.
        is_shared: Whether all processes share the samples; else this one gets them all.
    """
    trainer = data.trainer
    device = "cpu" if trainer is None else trainer.strategy.root_device.type
    rank, world_size = data_rank(trainer) if is_shared else (0, 1)
    return {
        "rank": rank,
        "world_size": world_size,
        "num_workers": data.num_workers,
        "pin_memory": device == "cuda",
    }
