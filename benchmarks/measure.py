"""Time, memory and correctness, measured so that two figures of one run can be compared."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The profiler reports its own life on the terminal at any lower level.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor

from longnet_zoo.bench import Timing, alternate, choose_device, environment

__all__ = [
    "DTYPES",
    "Timing",
    "alternate",
    "available_mib",
    "choose_device",
    "command_line",
    "environment",
    "finish",
    "largest_excess",
    "make_parser",
    "peak_extra_mib",
    "timing_ms",
]

# Name -> dtype and tolerance against the float64 oracle, (absolute, relative).
DTYPES = {
    "float32": (torch.float32, (1e-5, 1e-4)),
    "bfloat16": (torch.bfloat16, (2e-2, 2e-2)),
    "float16": (torch.float16, (2e-2, 2e-2)),
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every resumable programme has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="default: float32 on a CPU, else bf16"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--output", type=Path, help="JSON file, written after every cell")
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished cells of --output, run the others"
    )
    parser.add_argument(
        "--picture", action=argparse.BooleanOptionalAction, help="SVG and PNG beside --output"
    )
    return parser


def peak_extra_mib(run: Callable[[], Any]) -> float:
    """Peak memory of tensors and kernel buffers that a call allocates, result included, in MiB.

    Counted allocation by allocation, so it does not depend on the load of the machine.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
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


def timing_ms(timing: Timing) -> dict[str, float]:
    """A timing in milliseconds, as cells hold it."""
    return {
        "median_ms": 1000 * timing.median_s,
        "low_ms": 1000 * timing.low_s,
        "high_ms": 1000 * timing.high_s,
    }


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


def largest_excess(found: Tensor, expected: Tensor, dtype: str) -> float:
    """Largest error over its tolerance: at most 1 for a right result, NaN for NaNs.

    The tolerance of a half type is relative to the largest value expected.
    """
    absolute, relative = DTYPES[dtype][1]
    expected = expected.double()
    size = expected.abs() if dtype == "float32" else expected.abs().max()
    return ((found.double() - expected).abs() / (absolute + relative * size)).max().item()


def command_line(output: str | Path | None) -> str:
    """The command of this process; wherever its results went, they are read from one folder."""
    given = sys.argv[1:]
    if output is not None:
        kept = f"benchmarks/results/{Path(output).name}"
        given = [kept if argument == str(output) else argument for argument in given]
    given = [argument for argument in given if argument != "--resume"]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *given])


def finish(results: dict[str, Any], output: str | Path | None) -> None:
    """Prints the results as one JSON document on the last line, and writes them if asked."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    # The command says where to, without the folders of this machine.
    document = {name: value for name, value in results.items() if name != "output"}
    document |= {"command": command_line(output), "environment": environment(device)}
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))
