"""Open data sets that `longnet-zoo data` fetches when asked; see `fetch`."""

from .catalogue import OPEN_DATA, OpenData, find_data
from .command import add_data_command
from .fetch import fetch_data, is_complete

__all__ = [
    "OPEN_DATA",
    "OpenData",
    "add_data_command",
    "fetch_data",
    "find_data",
    "is_complete",
]
