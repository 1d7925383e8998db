"""benchmarks/gpu.sh: with a stand-in for Python its order and its exits; the steps of a dry run."""

import json
import os
import runpy
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"
PROGRAMMES = [
    "pytest",
    "kernels",
    "length",
    "length",
    "models",
    "models",
    "longnet_zoo.cli",
    "streaming",
]
# Code 0 for the checks of the script itself. A programme gets its code from the cases, and leaves a
# line of its arguments, with tabs between them.
STAND_IN = """#!/bin/sh
[ "$1" = -m ] || {{ cat >/dev/null 2>&1; exit 0; }}
{{ printf '%s\t' "$@"; echo; }} >>{calls}
case "$2" in
{cases}
esac
exit 0
"""


def make_python(folder, cases=""):
    calls, python = folder / "calls", folder / "python"
    python.write_text(STAND_IN.format(calls=calls, cases=cases))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python, calls


def environment(folder, python, **more):
    return {**os.environ, "PYTHON": str(python), "OUT": str(folder / "out"), **more}


def run(folder, python, *arguments, **more):
    return subprocess.run(
        [SCRIPT, *arguments],
        env=environment(folder, python, **more),
        capture_output=True,
        text=True,
        check=False,
    )


def programmes(calls):
    return [line.split()[1].removeprefix("benchmarks.") for line in calls.read_text().splitlines()]


def test_steps_run_in_order_of_importance(tmp_path):
    python, calls = make_python(tmp_path)
    done = run(tmp_path, python)
    assert done.returncode == 0, done.stderr
    assert programmes(calls) == PROGRAMMES
    lines = calls.read_text().replace("\t", " ").splitlines()
    assert "--shapes 12x64 16x128" in lines[1]
    assert "--seq-lens 65536 1048576" in lines[1]
    assert "--max-seq-len 16777216 --max-backward-seq-len 4194304" in lines[3]
    assert "longnet_lm_base:1048576" in lines[4]
    for line in lines[1:]:
        assert "--resume" in line
        assert "--device cuda --dtype bfloat16" in line
        assert "--output " + str(tmp_path / "out") in line


def test_a_failed_step_does_not_stop_the_others(tmp_path):
    python, calls = make_python(tmp_path, cases="benchmarks.kernels) exit 1;;")
    done = run(tmp_path, python, "--dry-run")
    assert done.returncode == 1
    assert programmes(calls) == PROGRAMMES
    assert "== kernels ended with 1" in done.stdout


def test_missing_packages_of_the_tests_are_a_failure(tmp_path):
    python, calls = make_python(tmp_path)
    text = python.read_text()
    refuse = 'case "$2" in *pytest*) exit 1;; esac\n'
    python.write_text(text.replace("#!/bin/sh\n", f"#!/bin/sh\n[ $1 = -c ] && {refuse}", 1))
    done = run(tmp_path, python, "--dry-run")
    assert done.returncode == 1
    assert programmes(calls) == PROGRAMMES[1:]
    assert "== tests: left out, they need pytest, pytest-timeout and hypothesis" in done.stdout


def test_a_dry_run_leaves_the_results_alone(tmp_path):
    python, _ = make_python(tmp_path)
    done = run(tmp_path, python, "--dry-run", OUT="", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"results in {tmp_path}/tmp." in done.stdout


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path):
    python, _ = make_python(tmp_path)
    done = run(tmp_path, python, OUT=str(python / "out"))
    assert done.returncode == 2
    assert done.stderr == f"error: cannot make the folder {python}/out. Set OUT to another.\n"


def test_a_crash_is_resumed_twice(tmp_path):
    python, calls = make_python(tmp_path, cases="benchmarks.kernels) exit 75;;")
    assert run(tmp_path, python, "--dry-run").returncode == 1
    assert programmes(calls) == ["pytest", "kernels", "kernels", *PROGRAMMES[1:]]


def test_steps_beyond_the_time_are_left_out(tmp_path):
    python, calls = make_python(tmp_path)
    done = run(tmp_path, python, LIMIT_S="2")
    assert done.returncode == 1
    assert not calls.exists()
    assert "== kernels: left out, 2 s are over" in done.stdout


def test_a_step_is_stopped_at_its_time(tmp_path):
    cases = "benchmarks.kernels) exec sleep 60;;"
    python, calls = make_python(tmp_path, cases=cases)
    start_s = time.monotonic()
    done = run(tmp_path, python, LIMIT_S="4")
    assert time.monotonic() - start_s < 30
    assert "== kernels ended with 124" in done.stdout
    assert programmes(calls) == ["pytest", "kernels"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_programme_in_order(number, tmp_path):
    stopped, ready = tmp_path / "stopped", tmp_path / "ready"
    trap = f"trap 'echo yes >{stopped}; exit 130' TERM; echo yes >{ready}; sleep 60 & wait;;"
    python, calls = make_python(tmp_path, cases=f"benchmarks.kernels) {trap}")
    with subprocess.Popen(
        [SCRIPT],
        env=environment(tmp_path, python),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in the background of a shell ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline_s = time.monotonic() + 120
        while not ready.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            if not stopped.exists():
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert f"finished cells are kept in {tmp_path / 'out'}" in errors
    assert stopped.exists()
    assert programmes(calls) == ["pytest", "kernels"]


def test_what_is_missing_is_said_in_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = run(tmp_path, python)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "lacks torch einops timm safetensors huggingface_hub rich numpy: pip in" in done.stderr
    done = run(tmp_path, tmp_path / "none")
    assert done.returncode == 2
    assert "none does not run. Set PYTHON." in done.stderr
    done = run(tmp_path, python, "--dry")
    assert done.returncode == 2
    assert "the only option is --dry-run, got --dry" in done.stderr


@pytest.mark.slow
def test_dry_run_leaves_a_whole_file_for_every_step(tmp_path, monkeypatch):
    python, calls = make_python(tmp_path)
    done = run(tmp_path, python, "--dry-run")
    assert done.returncode == 0, done.stderr
    tests, *steps = (line.split("\t")[1:-1] for line in calls.read_text().splitlines())
    place = tests.index("--collect-only") + 1
    assert all((SCRIPT.parents[1] / file).is_file() for file in tests[place:])
    # One file is enough to see that pytest takes these arguments and finds tests.
    subprocess.run([sys.executable, "-m", *tests[: place + 1]], cwd=SCRIPT.parents[1], check=True)
    for module, *arguments in steps:
        # In this process: to import PyTorch for each takes longer than what it does. Another test
        # runs all kernels.
        only = ["--backends", "sdpa"] if module == "benchmarks.kernels" else []
        run_module(module, [*arguments, *only], monkeypatch)
    files = {path.stem: path for path in (tmp_path / "out").glob("*.json")}
    names = ["kernels", "length", "length-pieces", "models", "models-million", "bench", "streaming"]
    assert set(files) == {f"{name}-dry" for name in names}
    for path in files.values():
        document = json.loads(path.read_text())
        assert document["is_complete"]
        assert document["cells"]
    # No more files than a machine may be asked to send back.
    assert len(list((tmp_path / "out").iterdir())) <= 9


def run_module(module, arguments, monkeypatch):
    """Does what `python -m` does, which must end with 0."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    # Of which there is a warning where another test has imported it.
    monkeypatch.delitem(sys.modules, module, raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    assert not end.value.code, module
