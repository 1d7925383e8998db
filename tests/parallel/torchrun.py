"""Runs checks in several processes under torchrun, as many as possible in one launch.

A module of checks has a dict `CASES`: name to a function that every rank calls at the same time and
that raises where something is wrong. To start processes takes longer than most checks, so a launch
runs all modules of its number of ranks, whatever the number of tests that ask for a result.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import filelock
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
# Of a single collective: what waits longer waits for ever.
COLLECTIVE_TIMEOUT = timedelta(seconds=20)
LAUNCH_TIMEOUT_S = 300
EVERY_SIZE = (
    "tests.parallel.part_cases",
    "tests.parallel.ring_cases",
    "tests.parallel.dilated_cases",
    "tests.parallel.model_cases",
    "tests.planner.traffic_cases",
)
# Modules that share a launch, by the number of ranks.
TOGETHER = {
    2: (
        *EVERY_SIZE,
        "tests.parallel.triton_cases",
        "tests.parallel.compile_cases",
        "tests.parallel.contrastive_cases",
        "tests.parallel.multimodal_cases",
        "tests.planner.memory_cases",
    ),
    3: EVERY_SIZE,
    4: (*EVERY_SIZE, "tests.parallel.mesh_cases"),
}


def check_case(
    tmp_path_factory: pytest.TempPathFactory, module: str, world_size: int, case: str
) -> None:
    """Fails with the traceback of the first rank on which a case failed."""
    shared = TOGETHER[world_size]
    # A developer who runs one file does not wait for the others.
    is_shared = module in shared and "PYTEST_XDIST_WORKER" in os.environ
    results = _run_cases(tmp_path_factory, shared if is_shared else (module,), world_size)
    name = f"{module}:{case}"
    assert name in results, f"{name} did not run: {results.get('', 'no output')}"
    assert results[name] is None, results[name]


def _run_cases(
    tmp_path_factory: pytest.TempPathFactory, modules: Sequence[str], world_size: int
) -> dict[str, str | None]:
    """Runs all cases of modules on some ranks, once; returns a traceback or None for each.

    What the processes printed, if they did not end well, is under the name "".
    """
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # that of all workers of this test run
    output = folder / f"{modules[0]}-{world_size}.json"
    with filelock.FileLock(output.with_suffix(".lock")):
        if not output.exists():
            args = ["-m", __name__, str(output), *modules]
            done = torchrun(args, world_size=world_size, timeout_s=LAUNCH_TIMEOUT_S)
            results = json.loads(output.read_text()) if output.exists() else {}
            if done.returncode:
                results[""] = f"exit status {done.returncode}\n{done.stdout}"
            output.write_text(json.dumps(results))
        return json.loads(output.read_text())


def torchrun(
    args: Sequence[str],
    *,
    world_size: int,
    timeout_s: float = 200,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a programme under torchrun on a free port; ends all its processes when time is up."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", *options, *args]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **_interpreted(), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # Its workers have sessions of their own: torchrun itself must end them.
        process.send_signal(signal.SIGTERM)
        try:
            text, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
        return subprocess.CompletedProcess(command, -signal.SIGTERM, f"timed out\n{text}", "")
    return subprocess.CompletedProcess(command, process.returncode, text, "")


def _interpreted() -> dict[str, str]:
    """Lets Triton's kernels run where there is no GPU."""
    return {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}


def main(output: str, *modules: str) -> None:
    """Runs the cases on this rank; rank 0 writes the results after each."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    results: dict[str, str | None] = {}
    for module in modules:
        for name, case in importlib.import_module(module).CASES.items():
            results[f"{module}:{name}"] = _run_case(f"{module}:{name}", case)
            if dist.get_rank() == 0:
                Path(output).write_text(json.dumps(results))
    dist.barrier()  # a rank that leaves first can abort one that still works
    dist.destroy_process_group()


def _run_case(name: str, case: Callable[[], None]) -> str | None:
    """Returns the traceback of the first rank on which a case failed; None if it did not."""
    torch.manual_seed(0)
    error = None
    try:
        case()
    except (Exception, pytest.fail.Exception):
        error = f"rank {dist.get_rank()}\n{traceback.format_exc()}"
        # A rank that failed between two collectives leaves the others waiting, and what follows
        # fails, too: this is the error to look at.
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((text for text in errors if text is not None), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
