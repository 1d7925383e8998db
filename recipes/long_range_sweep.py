r"""Trains dilated and dense attention on long-range tasks at equal training FLOPs, and compares.

    python -m recipes.long_range_sweep
    python -m recipes.long_range_sweep --tasks mqar passkey --lengths 1024 --seeds 3 --jobs 2

For each task, length, attention and seed it runs `recipes.long_range` with `configs/long_range/
TASK.yaml`. Batches of every length have as many tokens as those of the file, one example at least,
unless `--argument` says how many. A run that is finished is not run again; one that was stopped
goes on from its last checkpoint. Runs of other settings lie in other folders under `--folder`, and
stay. At the end, or at once where all runs are there, it writes the figures to `--output`, draws
them beside it, writes the tables to `--page` and prints them.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console

from longnet_zoo.bench import check_output, save_picture, write_json
from longnet_zoo.long_range import (
    TRAINING_FILE,
    Cell,
    accuracy_table,
    draw_accuracy,
    make_cell,
)
from longnet_zoo.registry import find_model
from recipes.long_range_page import long_range_page
from recipes.processes import Processes, stopping_at_sigterm

__all__ = ["Run", "SweepConfig", "main", "run_sweep"]

_CONFIGS = Path("configs/long_range")
_ATTENTIONS = ("dilated", "dense")
# What a comparison sets itself, or what would put all runs into one folder.
_FIXED = (
    *("model.task", "model.seq_len", "model.attention", "seed_everything", "data.seed"),
    *("trainer.default_root_dir", "config", "ckpt_path"),
)


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
        if self.output.suffix != ".json":
            raise ValueError(f"output must end in .json, got {self.output}.")
        self._check_tasks()
        self._check_arguments()

    def _check_tasks(self) -> None:
        known = sorted(path.stem for path in _CONFIGS.glob("*.yaml"))
        if not known:
            raise ValueError(f"there is no {_CONFIGS} in {Path.cwd()}. Call it in the clone.")
        if not self.tasks or set(self.tasks) - set(known):
            raise ValueError(
                f"tasks must have a file in {_CONFIGS}, got {list(self.tasks)}; there are "
                f"{', '.join(known)}."
            )

    def _check_arguments(self) -> None:
        for argument in self.arguments:
            name, sign, _ = argument.partition("=")
            if not name.startswith("--") or not sign:
                raise ValueError(f"an argument must be --NAME=VALUE, got {argument!r}.")
            name = name.removeprefix("--")
            if any(fixed == name or fixed.startswith(f"{name}.") for fixed in _FIXED):
                raise ValueError(
                    f"an argument cannot set {name}, which the comparison sets for each run "
                    f"itself, got {argument!r}. Use --tasks, --lengths, --seeds or --folder."
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
        """Returns its folder, which other settings do not share."""
        text = json.dumps(self.settings(config), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{self.seq_len}-{self.attention}-seed{self.seed}"
        return config.folder / f"{self.task}-{digest}" / name

    def is_finished(self, config: SweepConfig) -> bool:
        """Returns whether its figures are there."""
        training = self.folder(config) / "model" / TRAINING_FILE
        return training.is_file() and (self.folder(config) / "metrics.json").is_file()

    def record(self, config: SweepConfig) -> dict[str, Any]:
        """Returns its figures."""
        return json.loads((self.folder(config) / "metrics.json").read_text())

    def settings(self, config: SweepConfig) -> dict[str, Any]:
        """Returns all that its figures depend on, besides length, attention and seed."""
        found: dict[str, Any] = {
            "config": _settings(self.task),
            "arguments": list(config.arguments),
        }
        if _model_setting("pretrained", self.task, config):
            entry = find_model(_model_setting("model_name", self.task, config))
            found["weights"] = [published.sha256 for published in entry.weights]
        return found

    def command(self, config: SweepConfig) -> list[str]:
        """Returns the command line."""
        folder = self.folder(config)
        is_saved = (folder / "checkpoints" / "last.ckpt").is_file()
        return [
            *(sys.executable, "-m", "recipes.long_range", "fit"),
            *("--config", str(_config(self.task)), f"--seed_everything={self.seed}"),
            *(f"--model.seq_len={self.seq_len}", f"--model.attention={self.attention}"),
            f"--data.batch_size={_batch_size(self.task, self.seq_len)}",
            *(f"--data.seed={self.seed}", f"--trainer.default_root_dir={folder}"),
            *config.arguments,
            *(("--ckpt_path", "last") if is_saved else ()),
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
    _run_all(missing, config)
    failed = [run for run in missing if not run.is_finished(config)]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed: see "
            f"{', '.join(str(run.folder(config) / 'log.txt') for run in failed)}. Cure it, and run "
            "the same command again; finished runs stay."
        )
    evaluations = {task: _gather(task, runs, config) for task in config.tasks}
    _write(evaluations, [run.record(config)["environment"] for run in runs], config)
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


def _model_setting(name: str, task: str, config: SweepConfig) -> Any:
    """Returns a setting of the model section, which an argument may have changed."""
    start = f"--model.{name}="
    given = [word.removeprefix(start) for word in config.arguments if word.startswith(start)]
    return yaml.safe_load(given[-1]) if given else _settings(task)["model"].get(name)


def _run_all(runs: Sequence[Run], config: SweepConfig) -> None:
    """Runs trainings, some at a time, and prints what each came to."""
    for run in runs:
        folder = run.folder(config).parent
        folder.mkdir(parents=True, exist_ok=True)
        write_json(run.settings(config), folder / "settings.json")
    start, processes = time.monotonic(), Processes()
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        waiting = {pool.submit(_execute, run, config, processes): run for run in runs}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(waiting), 1):
                name = waiting[done].folder(config).relative_to(config.folder)
                minutes = (time.monotonic() - start) / 60
                left = minutes / number * (len(runs) - number)
                print(f"{number}/{len(runs)} {name}: {done.result()}", flush=True)
                print(f"    {minutes:.1f} minutes so far, about {left:.0f} left", flush=True)
        except BaseException:
            # Leaving the pool waits for all that is queued, and for all that runs.
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise


def _execute(run: Run, config: SweepConfig, processes: Processes) -> str:
    """Runs a training in a process of its own, and returns what it came to."""
    try:
        processes.run(run.command(config), folder=run.folder(config))
    except RuntimeError as error:
        return f"failed, {error}"
    if not run.is_finished(config):
        return "failed"
    record = run.record(config)
    share = 100 * record["test"]["right"] / record["test"]["asked"]
    return f"{share:.1f} % right after {record['training']['steps']:,} steps"


def _gather(task: str, runs: Sequence[Run], config: SweepConfig) -> list[Cell]:
    """Makes the cells of a task, lengths first, from what its runs have written."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run.task == task:
            groups.setdefault((run.seq_len, run.attention), []).append(run.record(config))
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
    run = Run(task=task, seq_len=config.lengths[0], attention=_ATTENTIONS[0], seed=0)
    written = yaml.safe_load((run.folder(config) / "config.yaml").read_text())["model"]
    return {name: x for name, x in written.items() if name not in ("seq_len", "attention")}


def _write(
    evaluations: dict[str, list[Cell]], environments: Sequence[dict[str, Any]], config: SweepConfig
) -> None:
    """Writes the figures and their page, draws them and prints the tables."""
    document = {
        "benchmark": "long_range_sweep",
        "command": _command(config),
        "seeds": config.seeds,
        "environment": _together(environments),
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


def _together(environments: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Returns the values that each entry had in some run: a sweep may have taken days."""
    names = environments[0]
    values = {name: {json.dumps(found[name]) for found in environments} for name in names}
    return {name: [json.loads(value) for value in sorted(values[name])] for name in names}


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
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
    try:
        with stopping_at_sigterm():
            run_sweep(SweepConfig(**given))
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on\n")


if __name__ == "__main__":
    main()
