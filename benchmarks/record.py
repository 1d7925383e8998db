"""How the programmes of this folder run, keep their cells and end.

A cell is what was found for one contender at one size. Whoever stops a run, by Ctrl-C or SIGTERM,
loses the cell in progress only: the same command with `--resume` goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import command_line
from benchmarks.pictures import draw_result
from longnet_zoo import bench
from longnet_zoo.bench import Cell, check_matplotlib

__all__ = ["Cell", "Crash", "Record", "reason_of", "run_programme", "stop_if_broken"]

# Exit codes: stopped by the user; and a contender broke the process, run again with --resume.
STOPPED, CRASHED = 130, 75
OUT_OF_MEMORY = "out of memory"


class Crash(RuntimeError):
    """A contender left the device unusable; what is recorded is kept."""


class Record(bench.Record):
    """The cells of a programme of this folder, called as this process was."""

    def __init__(
        self,
        benchmark: str,
        settings: dict[str, Any],
        *,
        device: torch.device,
        output: Path | None,
        resume: bool,
    ) -> None:
        super().__init__(
            benchmark,
            settings,
            command=command_line(output),
            device=device,
            output=output,
            resume=resume,
        )

    @property
    def has_failed(self) -> bool:
        """Whether anything but memory kept a cell from its figures."""
        reasons = (cell.get("reason", OUT_OF_MEMORY) for cell in self.cells)
        return any(not reason.startswith(OUT_OF_MEMORY) for reason in reasons)

    def complete(self) -> None:
        """Marks the run as finished, writes the file, prints the document on the last line."""
        super().complete()
        print(json.dumps(self.document))


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


def run_programme(main: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> None:
    """Runs a programme and exits.

    The status is 0, 1 if something was wrong, 2 if it could not run as asked, 75 after a crash, 130
    if it was stopped.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    # Programmes of one figure have no such option, and write at the end only.
    can_resume, picture = hasattr(options, "resume"), getattr(options, "picture", False)
    kept = "nothing is kept"
    if can_resume and options.output is not None:
        kept = f"finished cells are kept in {options.output}, --resume goes on"
    try:
        if options.output is None and ((can_resume and options.resume) or picture):
            raise ValueError("--resume and --picture need --output FILE, got none.")
        if picture:
            check_matplotlib()
        code = main(options)
        if options.output is not None and picture is not False:
            _draw(options.output, is_asked=bool(picture))
    except KeyboardInterrupt:
        print(f"stopped; {kept}", file=sys.stderr)
        code = STOPPED
    except Crash as error:
        print(f"{error}\n{kept}", file=sys.stderr)
        code = CRASHED
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code)


def _draw(file: Path, *, is_asked: bool) -> None:
    """Draws where it is asked for, or possible."""
    if is_asked or importlib.util.find_spec("matplotlib"):
        for path in draw_result(file):
            print(f"wrote {path}", file=sys.stderr)
