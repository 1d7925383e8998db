"""Time and memory, measured so that two figures of one run can be compared."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The profiler reports its own life on the terminal at any lower level.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

__all__ = ["Timing", "alternate", "environment", "finish", "peak_extra_mib"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contender: median and the 20 % and 80 % quantiles."""

    median_s: float
    low_s: float
    high_s: float


def alternate(
    contenders: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """Times functions in turn, round by round, so that a drifting machine is fair to all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        for name, run in contenders.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    return Timing(
        median_s=statistics.median(ordered),
        low_s=ordered[len(ordered) // 5],
        high_s=ordered[-1 - len(ordered) // 5],
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_extra_mib(run: Callable[[], Any]) -> float:
    """Peak memory of tensors and kernel buffers that a call allocates, result included, in MiB.

    Counted allocation by allocation, so it does not depend on the load of the machine.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        peak = torch.cuda.max_memory_allocated()
        del result
        return (peak - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = run()
    del result
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2**20


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code: machine, versions, commit."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": git.stdout.strip() or None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def finish(results: dict[str, Any], output: str | None) -> None:
    """Prints the results as one JSON document on the last line, and writes them if asked."""
    document = {**results, "environment": environment()}
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
