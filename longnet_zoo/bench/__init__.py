"""What is measured on a user's machine, and how: `longnet-zoo bench`."""

from .command import draw_bench, run_bench
from .comparison import ComparisonConfig, Lengths, compare
from .measure import Timing, alternate, choose_device, environment, make_progress, time_once
from .picture import Panel, check_matplotlib, draw, save_picture

__all__ = [
    "ComparisonConfig",
    "Lengths",
    "Panel",
    "Timing",
    "alternate",
    "check_matplotlib",
    "choose_device",
    "compare",
    "draw",
    "draw_bench",
    "environment",
    "make_progress",
    "run_bench",
    "save_picture",
    "time_once",
]
