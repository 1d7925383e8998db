"""Command lines that run side by side, and that stop together."""

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

__all__ = ["Processes", "stopping_at_sigterm"]


class Processes:
    """Runs command lines from several threads; `stop` ends them all, once.

    Each has a session of its own, so that Ctrl-C in a terminal reaches nobody but the caller, which
    passes on one signal. Each holds a lock on its folder, even where the caller was killed.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(self, command: Sequence[str], *, folder: Path) -> int | None:
        """Runs a command with one thread to its end; what it prints is added to `log.txt`.

        Args:
            command: The words of the command line.
            folder: Where the log lies; made if there is none.

        Returns:
            The exit status; None if all was stopped before it began.

        Raises:
            RuntimeError: A process works in this folder already.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            try:
                # The child inherits the open file, and with it the lock.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"another process works in {folder}. Wait until it has ended, or stop it."
                ) from None
            process = self._begin(command, log.fileno())
            if process is None:
                return None
            try:
                return process.wait()
            finally:
                with self._guard:
                    self._running.discard(process)

    def stop(self) -> None:
        """Asks all that run to end, by SIGTERM, and begins no more."""
        with self._guard:
            self._is_stopped = True
            for process in self._running:
                process.terminate()

    def _begin(self, command: Sequence[str], log: int) -> subprocess.Popen[bytes] | None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._guard:
            if self._is_stopped:
                return None
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
            self._running.add(process)
            return process


@contextlib.contextmanager
def stopping_at_sigterm() -> Iterator[None]:
    """Makes SIGTERM a KeyboardInterrupt, as Ctrl-C is one."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
