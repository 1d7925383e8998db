"""The Triton kernels as machine code, which the interpreter does not make: no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Of the programmes' rarely used parts; a loop that spills is hundreds of bytes.
MAX_SPILLED_BYTES = 128


def compiled(*options):
    """Runs the benchmark in a process of its own, since the interpreter may be on in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_resources", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "options", "tensor_cores"),
    [
        (80, ["--head-dim", "64"], "mma.sync"),
        (90, ["--head-dim", "64", "128"], "wgmma"),
        (100, ["--head-dim", "64"], "tcgen05.mma"),
    ],
)
def test_kernels_compile_into_few_registers_and_fit_shared_memory(
    capability, options, tensor_cores
):
    from benchmarks.triton_resources import SHARED_MEMORY

    rows = compiled("--capability", str(capability), "--first", *options)
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
        assert row["shared"] <= SHARED_MEMORY[capability], row
    units = {row["tensor_cores"] for row in rows if row["kernel"] == "forward"}
    assert units == {tensor_cores}


@pytest.mark.slow
def test_float32_kernels_compile():
    rows = compiled("--capability", "90", "--head-dim", "64", "--dtype", "fp32")
    assert len(rows) == 8
    for row in rows:
        # Few programmes sum a bias, and for float32 the registers do not suffice.
        assert row["kernel"] == "bias_gradient" or row["spilled"] <= MAX_SPILLED_BYTES, row


def test_the_interpreter_is_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_resources"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 keeps Triton from compiling" in done.stderr


@pytest.mark.slow
def test_calls_bind_tune_and_compile_as_on_a_gpu(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.kernels.triton_dry_run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    kernels = {"attend_rows", "query_gradient", "key_gradients", "row_deltas", "bias_gradient"}
    assert set(compiled) == kernels
    # Tile shapes that were timed are on disk.
    assert list(tmp_path.rglob("*.autotune.json"))
