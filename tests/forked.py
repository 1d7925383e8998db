"""Calls functions in processes of their own, which start at once.

A process that is started afresh imports PyTorch and Lightning for seconds before it does anything.
These are forked off a server, that has imported them and has no threads. This is for what needs
processes of its own, but no command of its own.
"""

import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal, and all that it printed."""

    status: int
    said: str


def fork(folder: Path, function: Callable[..., None], *args: object, **options: object) -> Ended:
    """Calls a function of a module in one process, whose output goes to a file in `folder`."""
    (ended,) = _fork(folder, partial(function, *args, **options), [{}])
    return ended


def fork_ranks(
    folder: Path, function: Callable[..., None], *args: object, world_size: int
) -> list[Ended]:
    """Calls a function of a module in so many processes that find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size}
    # By which Lightning knows that it need not start processes.
    group["TORCHELASTIC_RUN_ID"] = "tests"
    ranks = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return _fork(folder, partial(_call_in_group, function, *args), ranks)


def _call_in_group(function: Callable[..., None], *args: object) -> None:
    function(*args)
    if dist.is_initialized():
        # The first process holds the store of all, so none leaves while another one still works.
        dist.barrier()
        dist.destroy_process_group()


def _fork(
    folder: Path, function: Callable[[], None], environments: Sequence[Mapping[str, object]]
) -> list[Ended]:
    """Forks a process for each environment; when one fails, those that still run are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "longnet_zoo"])
    files = [folder / f"forked_{number}.txt" for number in range(len(environments))]
    processes = [
        # The server has the environment of its first call.
        context.Process(target=_call, args=(file, {**os.environ, **environment}, function))
        for file, environment in zip(files, environments, strict=True)
    ]
    running = {}
    try:
        for process in processes:
            process.start()
            running[process.sentinel] = process
        while running:
            ended = [running.pop(sentinel) for sentinel in wait(list(running))]
            for process in ended:
                process.join()
            if any(process.exitcode for process in ended):
                break
    finally:
        for process in running.values():
            process.kill()
            process.join()
    return [
        Ended(process.exitcode or 0, file.read_text())
        for process, file in zip(processes, files, strict=True)
    ]


def _call(file: Path, environment: Mapping[str, object], function: Callable[[], None]) -> None:
    os.environ.clear()
    os.environ.update({name: str(value) for name, value in environment.items()})
    with file.open("w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout = sys.stderr = said
        # As in a process that is started afresh, where no warning is an error.
        warnings.resetwarnings()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            function()
        except Exception:
            sys.excepthook(*sys.exc_info())
            sys.exit(1)
