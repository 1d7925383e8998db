"""Command lines side by side: one thread each, a log, a lock, and one stop for all."""

import os
import signal
import sys
import threading
import time

import pytest

from recipes.processes import Processes, stopping_at_sigterm

# Says when it runs and whether it was asked to end.
WAITING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
print("runs", flush=True)
time.sleep(60)
"""


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it has not happened in ten seconds")


def begin(processes, folder):
    """Runs a command that waits, in a thread, and returns the thread once the command runs."""
    command = [sys.executable, "-c", WAITING]
    thread = threading.Thread(target=processes.run, args=[command], kwargs={"folder": folder})
    thread.start()
    log = folder / "log.txt"
    wait_for(lambda: log.is_file() and "runs" in log.read_text())
    return thread


def test_a_command_has_one_thread_a_log_that_grows_and_an_exit_status(tmp_path):
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit('stopped')"
    command = [sys.executable, "-c", code]
    for _ in range(2):
        assert Processes().run(command, folder=tmp_path / "run") == 1
    assert (tmp_path / "run" / "log.txt").read_text().split() == ["1", "stopped"] * 2


def test_all_are_asked_to_end_and_none_begins_any_more(tmp_path):
    processes = Processes()
    threads = [begin(processes, tmp_path / name) for name in ("a", "b")]
    processes.stop()
    for thread in threads:
        thread.join(timeout=10)
    logs = [(tmp_path / name / "log.txt").read_text().split("\n") for name in ("a", "b")]
    assert logs == [["runs", "asked to end", ""]] * 2
    assert processes.run([sys.executable, "-c", "print(1)"], folder=tmp_path / "c") is None


def test_no_two_work_in_a_folder(tmp_path):
    processes = Processes()
    thread = begin(processes, tmp_path)
    with pytest.raises(RuntimeError, match=f"another process works in {tmp_path}"):
        Processes().run([sys.executable, "-c", "print(1)"], folder=tmp_path)
    processes.stop()
    thread.join(timeout=10)
    assert Processes().run([sys.executable, "-c", "print(1)"], folder=tmp_path) == 0


def test_sigterm_is_an_interrupt_for_a_while():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopping_at_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
