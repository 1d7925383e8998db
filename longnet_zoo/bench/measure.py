"""Times that can be compared, and what they depend on."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "Timing",
    "alternate",
    "available_mib",
    "choose_device",
    "environment",
    "make_progress",
    "time_once",
]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contender: median and the 20 % and 80 % quantiles."""

    median_s: float
    low_s: float
    high_s: float


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Times functions in turn, round by round, so that a drifting machine is fair to all.

    Args:
        contenders: Functions by name; what they return is dropped.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        on_run: Called with the name after every call, for a progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        for name, run in contenders.items():
            elapsed_s = time_once(run)
            if index >= warmup:
                seconds[name].append(elapsed_s)
            on_run(name)
    return {name: _timing(values) for name, values in seconds.items()}


def time_once(run: Callable[[], Any]) -> float:
    """Seconds of one call: between two CUDA events where a GPU is in use, else by the clock."""
    if not torch.cuda.is_initialized():
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    return Timing(
        median_s=statistics.median(ordered),
        low_s=ordered[len(ordered) // 5],
        high_s=ordered[-1 - len(ordered) // 5],
    )


def choose_device(device: str) -> torch.device:
    """The device of a name; `"auto"` takes a GPU if there is one.

    Raises:
        ValueError: If the name is neither `auto`, `cpu`, `cuda` nor `cuda:N`.
        RuntimeError: If there is no such GPU.
    """
    kind, _, index = device.partition(":")
    is_known = device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal())
    if not is_known:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}.")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    if kind == "cuda" and int(index or 0) >= num_gpus:
        raise RuntimeError(
            f"device {device!r} was asked for, and PyTorch {torch.__version__} sees {num_gpus} "
            "GPUs. Use device='cpu', or install a PyTorch built for your driver."
        )
    return torch.device(device)


def available_mib(device: torch.device) -> float:
    """Memory that can still be allocated, in MiB; infinite where the system does not say."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) / 2**20
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    (line,) = [line for line in lines if line.startswith("MemAvailable:")]
    return int(line.split()[1]) / 1024


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code and the settings: machine and versions."""
    is_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if is_cuda else None
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "device_type": device.type,
        "capability": list(capability) if capability else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "longnet_zoo": sys.modules["longnet_zoo"].__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _triton_version() -> str | None:
    # Its builds go by several names of packages, so only the module itself knows.
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of a clone, `-dirty` if its files differ; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short", "HEAD")
    # What a run itself writes is no other code.
    written = (":!benchmarks/results", ":!docs/performance.md")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return f"{commit}-dirty" if commit and changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None if nothing, or where it does not run."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def make_progress() -> Progress:
    """A progress bar on stderr that leaves no trace, shown on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
