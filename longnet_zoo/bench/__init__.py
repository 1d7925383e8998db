"""What is measured on a user's machine, and how: `longnet-zoo bench`."""

from .command import draw_bench, run_bench
from .comparison import ComparisonConfig, Lengths, compare
from .markdown import markdown_table
from .measure import (
    Timing,
    alternate,
    available_mib,
    choose_device,
    environment,
    make_progress,
    time_once,
)
from .picture import Panel, check_matplotlib, draw, save_picture
from .record import Cell, Record, check_output, reading, write_json

__all__ = [
    "Cell",
    "ComparisonConfig",
    "Lengths",
    "Panel",
    "Record",
    "Timing",
    "alternate",
    "available_mib",
    "check_matplotlib",
    "check_output",
    "choose_device",
    "compare",
    "draw",
    "draw_bench",
    "environment",
    "make_progress",
    "markdown_table",
    "reading",
    "run_bench",
    "save_picture",
    "time_once",
    "write_json",
]
