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
from typing import Any, NoReturn

# The profiler reports its own life on the terminal at any lower level.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor

from longnet_zoo.bench import (
    Timing,
    alternate,
    available_mib,
    check_output,
    choose_device,
    environment,
    write_json,
)

__all__ = [
    "DTYPES",
    "Parser",
    "Timing",
    "alternate",
    "at_least_1",
    "available_mib",
    "check_output",
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


class Parser(argparse.ArgumentParser):
    """Keeps the lines of a description, and says what is wrong in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def at_least_1(text: str) -> int:
    """Reads a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def make_parser(description: str | None) -> Parser:
    """A parser with the options that every resumable programme has."""
    parser = Parser(description)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="default: float32 on a CPU, else bf16"
    )
    parser.add_argument("--rounds", type=at_least_1, default=5, help="timed rounds")
    parser.add_argument("--threads", type=at_least_1, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--output", type=Path, help="JSON file, overwritten after every cell")
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


def largest_excess(found: Tensor, expected: Tensor, dtype: str) -> float:
    """Largest error over its tolerance: at most 1 for a right result, NaN for NaNs.

    The tolerance of a half type is relative to the largest value expected.
    """
    absolute, relative = DTYPES[dtype][1]
    expected = expected.double()
    size = expected.abs() if dtype == "float32" else expected.abs().max()
    return ((found.double() - expected).abs() / (absolute + relative * size)).max().item()


def command_line(output: Path | None) -> str:
    """The command of this process; wherever its results went, they are read from one folder."""
    given = sys.argv[1:]
    if output is not None:
        kept = f"benchmarks/results/{output.name}"
        given = [kept if argument == str(output) else argument for argument in given]
    given = [argument for argument in given if argument != "--resume"]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *given])


def finish(results: dict[str, Any], output: Path | None) -> None:
    """Prints the results as one JSON document on the last line, and writes them if asked."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    # The command says where to, without the folders of this machine.
    document = {name: value for name, value in results.items() if name != "output"}
    document |= {"command": command_line(output), "environment": environment(device)}
    if output is not None:
        write_json(document, output)
    print(json.dumps(document))
