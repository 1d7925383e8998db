"""The Triton kernels as machine code, which the interpreter does not make: no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks import triton_resources

ROOT = Path(__file__).resolve().parents[3]
# Of the programmes' rarely used parts; a loop that spills is hundreds of bytes.
MAX_SPILLED_BYTES = 128


HALF_RUNS = {  # by compute capability, with the unit that multiplies
    80: ("mma.sync", ["--capability", "80", "--first", "--head-dim", "64"]),
    90: ("wgmma", ["--capability", "90", "--first", "--head-dim", "64", "128"]),
    100: ("tcgen05.mma", ["--capability", "100", "--first", "--head-dim", "64"]),
}
FLOAT32_RUN = ["--capability", "90", "--head-dim", "64", "--dtype", "fp32"]
# The benchmark with several options, in one process: to start takes longer than most runs.
RUN_ALL = """
import json, sys
from benchmarks.triton_resources import main

for options in json.loads(sys.argv.pop()):
    sys.argv[1:] = options
    main()
"""


def run_compiling(*arguments, **variables):
    """Runs Python in a process of its own, since the interpreter may be on in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**environment, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{"))]


@pytest.mark.slow
def test_kernels_compile_into_few_registers_and_fit_shared_memory():
    runs = [*(options for _, options in HALF_RUNS.values()), FLOAT32_RUN]
    *half, float32 = run_compiling("-c", RUN_ALL, json.dumps(runs))
    for (capability, (tensor_cores, _)), document in zip(HALF_RUNS.items(), half, strict=True):
        rows = document["rows"]
        names = {row["kernel"] for row in rows}
        assert {
            "forward",
            "query_gradient",
            "key_gradients last",
            "row_deltas",
            "bias_gradient",
        } <= names
        for row in rows:
            assert 0 < row["registers"] <= 255, row
            assert row["spilled"] <= MAX_SPILLED_BYTES, row
            assert row["shared"] <= triton_resources.SHARED_MEMORY[capability], row
        units = {row["tensor_cores"] for row in rows if row["kernel"] == "forward"}
        assert units == {tensor_cores}
    assert len(float32["rows"]) == 8
    for row in float32["rows"]:
        # Few programmes sum a bias, and for float32 the registers do not suffice.
        assert row["kernel"] == "bias_gradient" or row["spilled"] <= MAX_SPILLED_BYTES, row


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(sys, "argv", ["triton_resources"])
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1 keeps Triton from compiling"):
        triton_resources.main()


@pytest.mark.slow
def test_calls_bind_tune_and_compile_as_on_a_gpu(tmp_path):
    (compiled,) = run_compiling(
        "-m", "tests.ops.kernels.triton_dry_run", TRITON_CACHE_DIR=str(tmp_path)
    )
    kernels = {"attend_rows", "query_gradient", "key_gradients", "row_deltas", "bias_gradient"}
    assert set(compiled) == kernels
    # Tile shapes that were timed are on disk.
    assert list(tmp_path.rglob("*.autotune.json"))
