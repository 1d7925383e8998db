"""Finished cells of a run, in a JSON file that is whole at any moment.

A cell is what was found at one size. Whoever stops a run loses the cell in progress only.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .measure import environment

__all__ = ["Cell", "Record", "check_output", "reading", "write_json"]

Cell = dict[str, Any]


class Record:
    """The cells of one run, and of the run that it resumes.

    Args:
        benchmark: Name of the programme.
        settings: Every option that decides what a cell holds.
        command: What was called.
        device: Where it runs.
        output: JSON file; None keeps the cells in memory.
        resume: Whether to keep the cells that `output` holds.

    Raises:
        ValueError: If `output` cannot be written, or the file to resume is none of ours, or is of
            another benchmark, other settings, another machine or another commit.
    """

    def __init__(
        self,
        benchmark: str,
        settings: dict[str, Any],
        *,
        command: str,
        device: torch.device,
        output: Path | None,
        resume: bool,
    ) -> None:
        self.output = output
        self.document: dict[str, Any] = {
            "benchmark": benchmark,
            "command": command,
            # As JSON gives it back, so that tuples and lists compare.
            "settings": json.loads(json.dumps(settings)),
            "environment": environment(device),
            "is_complete": False,
            "cells": [],
        }
        if output is not None:
            check_output(output)
            if resume and output.exists():
                self._resume(output)

    @property
    def cells(self) -> list[Cell]:
        """What was found, in order."""
        return self.document["cells"]

    def find(self, **key: Any) -> Cell | None:
        """The cell with these values, or None."""
        found = (cell for cell in self.cells if all(cell.get(x) == key[x] for x in key))
        return next(found, None)

    def add(self, cells: Iterable[Cell]) -> None:
        """Adds cells and writes the file."""
        self.cells.extend(_rounded(cell) for cell in cells)
        self._write()

    def complete(self) -> None:
        """Marks the run as finished and writes the file."""
        self.document["is_complete"] = True
        self._write()

    def _write(self) -> None:
        if self.output is not None:
            write_json(self.document, self.output)

    def _resume(self, file: Path) -> None:
        with reading(file):
            old = json.loads(file.read_text(encoding="utf-8"))
            cells = [dict(cell) for cell in old["cells"]]
            before, now = (
                {**document, "environment": {**document["environment"], "date": None}}
                for document in (old, self.document)
            )
            names = ("benchmark", "settings", "environment")
            differing = [(name, before[name], now[name]) for name in names]
        for name, found, wanted in differing:
            if found != wanted:
                raise ValueError(
                    f"--resume needs a file of the same programme, settings, machine and commit, "
                    f"but {file} has {name} {found} and this run {wanted}. Run without --resume, "
                    "or give another --output."
                )
        self.document["cells"] = cells


def write_json(document: dict[str, Any], file: Path) -> None:
    """Writes a document so that no interrupt leaves half a file."""
    whole = file.with_name(f"{file.name}.part")
    whole.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, file)


def check_output(file: Path) -> None:
    """Makes the folder of a file, and refuses early what could not be written in the end.

    Raises:
        ValueError: If there can be no such file.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            reason = "it is a folder" if file.is_dir() else None
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(
            f"--output must be a file that can be written, got {str(file)!r}: {reason}. "
            "Give another path."
        )


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Names the file in an error that its content causes.

    Raises:
        ValueError: If the content is not what the block needs.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{file} must hold JSON that a benchmark has written, got {type(error).__name__}: "
            f"{error}. Remove it, or measure again."
        ) from error


def _rounded(value: Any) -> Any:
    """Figures to five digits: more would be noise."""
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
