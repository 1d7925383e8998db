"""In which order `backend="auto"` tries the kernels: measured where it was, by design elsewhere.

`preference.json`, beside this file, holds the measured orders. `python -m benchmarks.kernels
--write-preference` makes it from benchmark results. What it lacks is ordered by `_DESIGN`: kernels
written for a chip come before general ones, and `math`, which stores logits, comes last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from .call import Call

__all__ = ["PREFERENCE_FILE", "Preference", "preference_from_rows", "preferred", "write_preference"]

PREFERENCE_FILE = Path(__file__).with_name("preference.json")

# A kernel that is missing here is never taken by itself: on a CPU, Triton is an interpreter.
_DESIGN = {
    "cpu": ("sdpa", "math"),
    "sm_90": ("flash3", "flash4", "cudnn", "triton", "flash2", "sdpa", "efficient", "math"),
    "sm_100": ("flash4", "cudnn", "triton", "flash2", "sdpa", "efficient", "math"),
    "cuda": ("flash4", "triton", "flash2", "sdpa", "cudnn", "efficient", "math"),
}
_PASSES = ("forward", "backward")


class Preference(NamedTuple):
    """Kernels by name, the first preferred, and where the order comes from."""

    order: tuple[str, ...]
    source: str


def preferred(call: Call) -> Preference:
    """Returns the order in which kernels are tried for a call."""
    device = _device_kind(call.device_type, call.capability)
    key = (device, _dtype_class(call.dtype), _PASSES[call.is_backward])
    design = _DESIGN.get(device, _DESIGN["cuda"] if call.device_type == "cuda" else ("math",))
    measured = _measured(PREFERENCE_FILE).get(key)
    if measured is None:
        return Preference(design, f"by design; {key[1]} not measured on {device}")
    return Preference(_completed(measured.order, design), measured.source)


def _completed(measured: tuple[str, ...], design: tuple[str, ...]) -> tuple[str, ...]:
    """Adds the kernels that were not measured after those that were, but before `math`."""
    order = tuple(name for name in measured if name in design)
    rest = tuple(name for name in design if name not in order)
    if order[-1:] == ("math",):
        return (*order[:-1], *rest, "math")
    return order + rest


def preference_from_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns benchmark results into the rows of `preference.json`.

    Kernels are ordered by the geometric mean, over head_dims, of their time divided by the shortest
    time at that head_dim. Rows of one kernel that differ in nothing named here are averaged
    likewise, so each kernel should have been measured on the same shapes.

    Args:
        rows: Each a mapping of `device` (its name), `capability` (such as [9, 0]; None on a CPU),
            `dtype` (such as "bfloat16"), `head_dim`, `pass` ("forward" or "backward"), `backend`,
            `ms`, and perhaps `date`.

    Returns:
        One row for each kind of device, class of dtypes and pass.

    Raises:
        ValueError: If a pass, a dtype or a time is none.
    """
    times: dict[tuple[str, str, str], dict[int, dict[str, list[float]]]] = {}
    places: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row["pass"] not in _PASSES or not row["ms"] > 0:
            raise ValueError(
                f"pass must be one of {_PASSES} and ms positive, got {row['pass']!r} and "
                f"{row['ms']}."
            )
        dtype = getattr(torch, row["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must name a dtype of torch, got {row['dtype']!r}.")
        device = _device_kind("cpu" if row["capability"] is None else "cuda", row["capability"])
        key = (device, _dtype_class(dtype), row["pass"])
        by_backend = times.setdefault(key, {}).setdefault(row["head_dim"], {})
        by_backend.setdefault(row["backend"], []).append(log(row["ms"]))
        date = f", {row['date']}" if "date" in row else ""
        places.setdefault(key, set()).add(f"{row['device']}{date}")
    return [
        {
            "device": device,
            "dtype": dtype_class,
            "pass": passed,
            "order": _ranked(by_head_dim),
            "source": f"measured on {'; '.join(sorted(places[device, dtype_class, passed]))}",
        }
        for (device, dtype_class, passed), by_head_dim in sorted(times.items())
    ]


def write_preference(rows: Sequence[Mapping[str, Any]], file: Path = PREFERENCE_FILE) -> None:
    """Writes the table of benchmark results; what was measured elsewhere before stays."""
    table = {_key(row): row for row in _read(file)}
    table |= {_key(row): row for row in preference_from_rows(rows)}
    lines = ",\n".join(json.dumps(table[key]) for key in sorted(table))
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    _measured.cache_clear()


def _ranked(by_head_dim: Mapping[int, Mapping[str, list[float]]]) -> list[str]:
    losses: dict[str, list[float]] = {}
    for by_backend in by_head_dim.values():
        means = {name: fmean(log_times) for name, log_times in by_backend.items()}
        best = min(means.values())
        for name, mean in means.items():
            losses.setdefault(name, []).append(mean - best)
    return sorted(losses, key=lambda name: (fmean(losses[name]), name))


@lru_cache
def _measured(file: Path) -> dict[tuple[str, str, str], Preference]:
    return {_key(row): Preference(tuple(row["order"]), row["source"]) for row in _read(file)}


def _read(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["device"], row["dtype"], row["pass"]


def _device_kind(device_type: str, capability: Sequence[int] | None) -> str:
    if device_type != "cuda" or capability is None:
        return device_type
    major, minor = capability
    return f"sm_{major}{minor}"


def _dtype_class(dtype: torch.dtype) -> str:
    return "half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")
