"""What `longnet-zoo evaluate` does."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longnet_zoo.bench import (
    check_matplotlib,
    check_output,
    choose_device,
    environment,
    make_progress,
    save_picture,
    write_json,
)
from longnet_zoo.command_options import add_option_argument, read_options

from .evaluation import Cell, evaluate
from .models import find_sources, load_source
from .registry import TASKS, make_task
from .table import accuracy_table, draw_accuracy
from .task import Task

__all__ = ["add_evaluate_command"]


def add_evaluate_command(commands: Any) -> None:
    """Adds the command to those of `longnet-zoo`."""
    command = commands.add_parser(
        "evaluate",
        help="accuracy at long-range tasks by length",
        description="Asks models what long-range tasks ask, and prints the accuracy by length.",
    )
    command.add_argument("--task", required=True, help=", ".join(TASKS))
    command.add_argument(
        "--models",
        required=True,
        nargs="+",
        metavar="LABEL=SOURCE",
        help="models: a name with published weights, a folder of save_pretrained, or a recipe's "
        "checkpoint; a pattern such as dilated='runs/a-*/model' takes several runs together",
    )
    command.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS", help="default: as usual for the task"
    )
    add_option_argument(command, words="an option of the task, such as num_pairs=16")
    command.add_argument(
        "--examples", type=int, default=200, help="examples of each seed (default: 200)"
    )
    command.add_argument("--seeds", type=int, default=1, help="seeds of examples (default: 1)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--output", type=Path, help="write a JSON file, after every length and label"
    )
    command.add_argument(
        "--picture", action="store_true", help="draw .svg and .png beside the JSON file"
    )
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from rich.markup import escape

    tasks = _tasks(options)
    _check_output(options)
    device = choose_device(options.device)
    models = []
    for source in find_sources(options.models):
        model, training = load_source(source)
        models.append((source.label, model.to(device), dict(training)))
    num_labels = len({label for label, _, _ in models})
    cells: list[Cell] = []
    document = {
        "benchmark": "evaluate",
        "command": shlex.join(_words(options)),
        "task": tasks[0].name,
        "environment": environment(device),
    }
    try:
        with make_progress() as progress:
            bar = progress.add_task("examples", total=num_labels * len(tasks))
            for cell in evaluate(
                models,
                tasks,
                num_examples=options.examples,
                seeds=options.seeds,
                on_start=lambda words, n: progress.update(
                    bar, description=escape(f"{words} {n:,}")
                ),
                on_score=lambda label, n: progress.advance(bar),
            ):
                cells.append(cell)
                if options.output is not None:
                    write_json(
                        {**document, "cells": [asdict(cell) for cell in cells]}, options.output
                    )
    finally:
        # What was found before an error or an interruption stays.
        if cells:
            _print(cells, title=tasks[0].name)
    if options.output is not None:
        paths = [options.output, *_draw(options, cells, tasks[0].name)]
        sys.stdout.writelines(f"wrote {path}\n" for path in paths)


def _tasks(options: argparse.Namespace) -> list[Task]:
    """Makes the task at each length, shortest first."""
    given = read_options(options.option, function=make_task)
    lengths: Sequence[int | None] = sorted(set(options.lengths or [])) or [None]
    return [make_task(options.task, seq_len=length, **given) for length in lengths]


def _check_output(options: argparse.Namespace) -> None:
    if options.picture and options.output is None:
        raise ValueError("--picture lies beside --output FILE.json, got no --output.")
    if options.output is None:
        return
    if options.output.suffix != ".json":
        raise ValueError(f"--output must end in .json, got {options.output}.")
    check_output(options.output)
    if options.picture:
        check_matplotlib()


def _words(options: argparse.Namespace) -> list[str]:
    """The command line that does the same."""
    words = ["longnet-zoo", "evaluate", "--task", options.task, "--models", *options.models]
    if options.lengths:
        words += ["--lengths", *map(str, options.lengths)]
    words += [word for option in options.option for word in ("--option", option)]
    return [*words, "--examples", str(options.examples), "--seeds", str(options.seeds)]


def _draw(options: argparse.Namespace, cells: Sequence[Cell], name: str) -> tuple[Path, ...]:
    if not options.picture:
        return ()
    facts = f"test examples of each length: {cells[0].num_examples}"
    figure = draw_accuracy({name: cells}, title="Accuracy by length", facts=facts)
    return save_picture(figure, options.output)


def _print(cells: Sequence[Cell], *, title: str) -> None:
    from rich.console import Console

    Console().print(accuracy_table(cells, title=title))
