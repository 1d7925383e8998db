"""Finished cells of a programme, in a JSON file that is whole at any moment.

A cell is what was found for one contender at one size. Whoever stops a run, by Ctrl-C or SIGTERM,
loses the cell in progress only: the same command with `--resume` goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import command_line, environment
from benchmarks.pictures import draw_result
from longnet_zoo.bench import check_matplotlib

__all__ = ["Cell", "Crash", "Record", "reason_of", "run_programme", "stop_if_broken"]

# Exit codes: stopped by the user; and a contender broke the process, run again with --resume.
STOPPED, CRASHED = 130, 75
OUT_OF_MEMORY = "out of memory"
# What may differ between the runs whose cells one file holds.
_MAY_DIFFER = ("date", "commit")

Cell = dict[str, Any]


class Crash(RuntimeError):
    """A contender left the device unusable; what is recorded is kept."""


class Record:
    """The cells of one run, and of the runs that it resumes.

    Args:
        benchmark: Name of the programme.
        settings: Every option that decides what a cell holds.
        device: Where it runs.
        output: JSON file; None keeps the cells in memory.
        resume: Whether to keep the cells that `output` holds.

    Raises:
        ValueError: If the file to resume holds another benchmark, other settings or another
            machine, or a file is in the way and `resume` is False.
    """

    def __init__(
        self,
        benchmark: str,
        settings: dict[str, Any],
        *,
        device: torch.device,
        output: Path | None,
        resume: bool,
    ) -> None:
        self.output = output
        self.document: dict[str, Any] = {
            "benchmark": benchmark,
            "command": command_line(output),
            # As JSON gives it back, so that tuples and lists compare.
            "settings": json.loads(json.dumps(settings)),
            "environment": environment(device),
            "is_complete": False,
            "cells": [],
        }
        if resume and output is not None and output.exists():
            self._resume(json.loads(output.read_text(encoding="utf-8")))

    @property
    def cells(self) -> list[Cell]:
        """What was found, in order."""
        return self.document["cells"]

    def find(self, **key: Any) -> Cell | None:
        """The cell with these values, or None."""
        found = (cell for cell in self.cells if all(cell.get(x) == key[x] for x in key))
        return next(found, None)

    @property
    def has_failed(self) -> bool:
        """Whether anything but memory kept a cell from its figures."""
        reasons = (cell.get("reason", OUT_OF_MEMORY) for cell in self.cells)
        return any(not reason.startswith(OUT_OF_MEMORY) for reason in reasons)

    def add(self, cells: Iterable[Cell]) -> None:
        """Adds cells and writes the file."""
        self.cells.extend(_rounded(cell) for cell in cells)
        self._write()

    def complete(self) -> None:
        """Marks the run as finished, writes the file, prints the document on the last line."""
        self.document["is_complete"] = True
        self._write()
        print(json.dumps(self.document))

    def _write(self) -> None:
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when whole, so that no interrupt leaves half a file.
        whole = self.output.with_suffix(".json.part")
        whole.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(whole, self.output)

    def _resume(self, old: dict[str, Any]) -> None:
        for name in ("benchmark", "settings", "environment"):
            before, now = old.get(name), self.document[name]
            if name == "environment" and isinstance(before, dict):
                before, now = (
                    {key: x for key, x in values.items() if key not in _MAY_DIFFER}
                    for values in (before, now)
                )
            if before != now:
                raise ValueError(
                    f"--resume needs a file of the same run, but {self.output} has {name} {before} "
                    f"and this run {now}. Run without --resume, or give another --output."
                )
        self.document["cells"] = old["cells"]


def reason_of(error: Exception) -> str:
    """One line that says why something does not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, ImportError):
        return f"not installed ({error})"
    line, *_ = str(error).splitlines() or [type(error).__name__]
    return line.partition(". Use backend=")[0]


def stop_if_broken(name: str, error: Exception) -> None:
    """Ends the run after an error that leaves the device unusable, its reason recorded.

    Raises:
        Crash: After a CUDA error other than a lack of memory.
    """
    if "CUDA error" in str(error):
        raise Crash(f"{name} broke the device: {error}") from error


def _draw(options: argparse.Namespace) -> None:
    """Draws where it is asked for, or possible and not refused."""
    if options.output is None or options.picture is False:
        return
    if options.picture or importlib.util.find_spec("matplotlib"):
        for path in draw_result(options.output):
            print(f"wrote {path}", file=sys.stderr)


def _rounded(value: Any) -> Any:
    """Figures to five digits: more would be noise."""
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def run_programme(main: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> None:
    """Runs a programme and exits: 0, 1 if something was wrong, 75 after a crash, 130 if stopped."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if options.picture:
        check_matplotlib()
    kept = f"finished cells are kept in {options.output}" if options.output else "nothing is kept"
    try:
        code = main(options)
        _draw(options)
    except KeyboardInterrupt:
        print(f"stopped; {kept}. --resume goes on.", file=sys.stderr)
        code = STOPPED
    except Crash as error:
        print(f"{error}\n{kept}. --resume goes on without it.", file=sys.stderr)
        code = CRASHED
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code)
