r"""Trains dilated and dense attention on long-range tasks at equal training FLOPs, and compares.

    python -m recipes.long_range_sweep
    python -m recipes.long_range_sweep --tasks mqar passkey --lengths 1024 --seeds 3 --jobs 2

For each task, length, attention and seed it runs `recipes.long_range` with `configs/long_range/
TASK.yaml`, in a folder of its own under `--folder`. Batches of every length have as many tokens as
those of the file, one example at least. A run that is finished is not run again; one that was
stopped goes on from its last checkpoint. At the end, or at once where all runs are there, it writes
the figures to `--output`, draws them beside it, writes the tables to `--page` and prints them.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from rich.console import Console

from longnet_zoo.bench import check_output, environment, save_picture, write_json
from longnet_zoo.long_range import (
    TRAINING_FILE,
    Cell,
    accuracy_table,
    draw_accuracy,
    make_cell,
)
from longnet_zoo.registry import find_model
from recipes.long_range_page import long_range_page

__all__ = ["Run", "SweepConfig", "main", "run_sweep"]

_CONFIGS = Path("configs/long_range")
_ATTENTIONS = ("dilated", "dense")
_LOG, _SETTINGS = "log.txt", "settings.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What to run.

    Attributes:
        tasks: Names of tasks; each has a file in `configs/long_range`.
        lengths: Tokens of an example.
        seeds: Runs of each, with seeds from 0 on.
        jobs: Runs at a time, each with one thread.
        folder: Where the runs lie.
        output: JSON file, with pictures beside it.
        page: Markdown file with the tables.
        arguments: Further arguments for every run.
    """

    tasks: tuple[str, ...] = ("mqar", "passkey", "selective_copying", "listops")
    lengths: tuple[int, ...] = (1024, 4096)
    seeds: int = 3
    jobs: int = 2
    folder: Path = Path("runs/long_range")
    output: Path = Path("benchmarks/results/long-range/cpu.json")
    page: Path = Path("docs/long-range.md")
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be 1 or more, one at least, got {self.lengths}.")
        missing = [task for task in self.tasks if not _config(task).is_file()]
        if missing or not self.tasks:
            known = sorted(path.stem for path in _CONFIGS.glob("*.yaml"))
            raise ValueError(
                f"tasks must have a file in {_CONFIGS}, got {list(self.tasks)}; there are "
                f"{', '.join(known)}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        task: Name of the task.
        seq_len: Tokens of an example.
        attention: "dilated" or "dense".
        seed: Seed of weights and examples.
    """

    task: str
    seq_len: int
    attention: str
    seed: int

    def folder(self, config: SweepConfig) -> Path:
        """Returns its folder."""
        return config.folder / f"{self.task}-{self.seq_len}-{self.attention}-seed{self.seed}"

    def is_begun(self, config: SweepConfig) -> bool:
        """Returns whether it has run with these settings, if not to its end."""
        file = self.folder(config) / _SETTINGS
        return file.is_file() and json.loads(file.read_text()) == self.settings(config)

    def is_finished(self, config: SweepConfig) -> bool:
        """Returns whether its figures are there."""
        training = self.folder(config) / "model" / TRAINING_FILE
        figures = self.folder(config) / "metrics.json"
        return self.is_begun(config) and training.is_file() and figures.is_file()

    def settings(self, config: SweepConfig) -> dict[str, Any]:
        """Returns all that its figures depend on."""
        settings = _settings(self.task)
        found: dict[str, Any] = {"config": settings, "arguments": list(config.arguments)}
        if settings["model"].get("pretrained"):
            weights = find_model(settings["model"]["model_name"]).weights
            found["weights"] = [published.sha256 for published in weights]
        return found

    def command(self, config: SweepConfig) -> list[str]:
        """Returns the command line."""
        folder = self.folder(config)
        is_saved = (folder / "checkpoints" / "last.ckpt").is_file() and self.is_begun(config)
        checkpoint = ["--ckpt_path", "last"] if is_saved else []
        return [
            *(sys.executable, "-m", "recipes.long_range", "fit"),
            *("--config", str(_config(self.task)), f"--seed_everything={self.seed}"),
            *(f"--model.seq_len={self.seq_len}", f"--model.attention={self.attention}"),
            f"--data.batch_size={_batch_size(self.task, self.seq_len)}",
            *(f"--data.seed={self.seed}", f"--trainer.default_root_dir={folder}"),
            *config.arguments,
            *checkpoint,
        ]


def run_sweep(config: SweepConfig) -> dict[str, list[Cell]]:
    """Runs what is missing, then gathers the figures.

    Args:
        config: What to run.

    Returns:
        The cells of each task.

    Raises:
        RuntimeError: A run failed; the others are finished first, and the message names its log.
    """
    for path in (config.output, config.page):
        check_output(path)
    runs = _runs(config)
    missing = [run for run in runs if not run.is_finished(config)]
    print(f"{len(runs)} runs in {config.folder}, {len(missing)} to do, {config.jobs} at a time")
    start, failed = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        waiting = {pool.submit(_execute, run, config): run for run in missing}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(waiting), 1):
                run, minutes = waiting[done], (time.monotonic() - start) / 60
                words = done.result()
                failed += [] if run.is_finished(config) else [run]
                left = minutes / number * (len(missing) - number)
                print(f"{number}/{len(missing)} {run.folder(config).name}: {words}", flush=True)
                print(f"    {minutes:.1f} minutes so far, about {left:.0f} left", flush=True)
        except BaseException:
            # Leaving the pool waits for all that is queued.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed: see "
            f"{', '.join(str(run.folder(config) / _LOG) for run in failed)}. Cure it, and run the "
            "same command again; finished runs stay."
        )
    evaluations = {task: _gather(task, runs, config) for task in config.tasks}
    _write(evaluations, config)
    return evaluations


def _config(task: str) -> Path:
    return _CONFIGS / f"{task}.yaml"


def _runs(config: SweepConfig) -> list[Run]:
    """Lists the runs, seeds outermost, so that an early stop leaves whole comparisons."""
    choices = itertools.product(range(config.seeds), config.tasks, config.lengths, _ATTENTIONS)
    runs = (
        Run(task=task, seq_len=length, attention=attention, seed=seed)
        for seed, task, length, attention in choices
    )
    return list(dict.fromkeys(runs))


def _settings(task: str) -> dict[str, Any]:
    """Returns what the file of a task says."""
    return yaml.safe_load(_config(task).read_text())


def _batch_size(task: str, seq_len: int) -> int:
    """Returns how many examples have about as many tokens as a batch of the task's file."""
    settings = _settings(task)
    num_tokens = settings["data"]["batch_size"] * settings["model"]["seq_len"]
    return max(1, num_tokens // seq_len)


def _execute(run: Run, config: SweepConfig) -> str:
    """Runs a training in a process of its own, and returns what it came to."""
    folder = run.folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    command = run.command(config)
    # Neither figures nor checkpoints of other settings must be taken for those of this run.
    (folder / "metrics.json").unlink(missing_ok=True)
    if not run.is_begun(config):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / _SETTINGS).write_text(json.dumps(run.settings(config), indent=1) + "\n")
    _start(command, folder / _LOG)
    if not run.is_finished(config):
        return "failed"
    record = json.loads((folder / "metrics.json").read_text())
    share = 100 * record["test"]["right"] / record["test"]["asked"]
    return f"{share:.1f} % right after {record['training']['steps']:,} steps"


def _start(command: list[str], log: Path) -> None:
    """Runs a command with one thread to its end, what it prints goes to a file."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env)


def _gather(task: str, runs: Sequence[Run], config: SweepConfig) -> list[Cell]:
    """Makes the cells of a task, lengths first, from what its runs have written."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run.task == task:
            record = json.loads((run.folder(config) / "metrics.json").read_text())
            groups.setdefault((run.seq_len, run.attention), []).append(record)
    # Stable, so that the order of the kinds of attention stays.
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [_cell(attention, records) for (_, attention), records in ordered]


def _cell(attention: str, records: Sequence[dict[str, Any]]) -> Cell:
    """Makes the cell of runs that differ in their seed only."""
    tests = [record["test"] for record in records]
    trainings = [record["training"] for record in records]
    return make_cell(
        attention,
        [test["right"] / test["asked"] for test in tests],
        tuple(tests[0]["interval"]),
        trainings=trainings,
        seq_len=trainings[0]["seq_len"],
        chance=tests[0]["chance"],
        # Each seed has test examples of its own.
        majority=fmean(test["majority"] for test in tests),
        num_examples=tests[0]["examples"],
        flops=trainings[0]["example_flops"],
    )


def _common_settings(task: str, config: SweepConfig) -> dict[str, Any]:
    """Returns the model section that all runs of a task had, further arguments included."""
    run = next(run for run in _runs(config) if run.task == task)
    written = yaml.safe_load((run.folder(config) / "config.yaml").read_text())["model"]
    return {name: x for name, x in written.items() if name not in ("seq_len", "attention")}


def _write(evaluations: dict[str, list[Cell]], config: SweepConfig) -> None:
    """Writes the figures and their page, draws them and prints the tables."""
    document = {
        "benchmark": "long_range_sweep",
        "command": _command(config),
        "seeds": config.seeds,
        "environment": environment(torch.device("cpu")),
        "settings": {task: _common_settings(task, config) for task in evaluations},
        "tasks": {
            task: [dataclasses.asdict(cell) for cell in cells]
            for task, cells in evaluations.items()
        },
    }
    write_json(document, config.output)
    facts = f"tested at the length of training, equal training FLOPs, seeds: {config.seeds}"
    figure = draw_accuracy(evaluations, title="Dilated against dense attention", facts=facts)
    svg, png = save_picture(figure, config.output)
    config.page.write_text(long_range_page(document, picture=svg, page=config.page))
    for path in (config.output, svg, png, config.page):
        print(f"wrote {path}")
    for task, cells in evaluations.items():
        Console().print(accuracy_table(cells, title=task))


def _command(config: SweepConfig) -> str:
    """Returns the command line that does the same, without folders of this machine."""
    words = ["python", "-m", "recipes.long_range_sweep"]
    for name in ("tasks", "lengths", "seeds"):
        value = getattr(config, name)
        if value != getattr(SweepConfig, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
    return shlex.join([*words, *(f"--argument={word}" for word in config.arguments)])


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    usual = SweepConfig
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=usual.tasks, metavar="TASK")
    parser.add_argument("--lengths", nargs="+", type=int, default=usual.lengths, metavar="TOKENS")
    parser.add_argument("--seeds", type=int, default=usual.seeds)
    parser.add_argument("--jobs", type=int, default=usual.jobs, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=usual.folder)
    parser.add_argument("--output", type=Path, default=usual.output)
    parser.add_argument("--page", type=Path, default=usual.page)
    parser.add_argument(
        "--argument", action="append", default=[], metavar="--NAME=VALUE", dest="arguments"
    )
    options = vars(parser.parse_args(args))
    try:
        run_sweep(
            SweepConfig(**{k: tuple(x) if isinstance(x, list) else x for k, x in options.items()})
        )
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on\n")


if __name__ == "__main__":
    main()
