"""Runs recipes one after another on the processes of a group, and says what happened.

A run is a name, the module of a recipe, and its arguments. Each process writes what a recipe
refused, as `NAME.error.RANK`, and the first one an empty `NAME.ended` after each run.
"""

import contextlib
import importlib
import io
import os
import signal
import time

import lightning as L
import torch

from tests.forked import fork_ranks
from tests.recipes.text_runs import arguments

STRATEGY = "recipes.sequence_parallel.SequenceParallelStrategy"


class Misfortune(L.Callback):
    """Lets one process fail at a step, the first time that torchrun starts it, or the second.

    Args:
        rank: The process.
        plan: What happens at which step, one for each start: "raise 3", "kill 7" or "hang 2".
    """

    def __init__(self, *, rank: int, plan: list[str]) -> None:
        self.rank, self.plan = rank, plan

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if trainer.global_rank != self.rank or start >= len(self.plan):
            return
        kind, step = self.plan[start].split()
        if trainer.global_step != int(step):
            return
        if kind == "raise":
            raise KeyError(f"misfortune of rank {self.rank} at step {step}")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        # Which a process that hangs would not handle; without, torchrun waits 30 seconds for it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)


class OtherWeights(L.Callback):
    """Gives every process weights of its own, as other seeds would."""

    @torch.no_grad()
    def setup(self, trainer, pl_module, stage):
        for parameter in pl_module.parameters():
            parameter.add_(trainer.global_rank)


def strategy(sequence_size, **options):
    """Returns the arguments that switch the strategy on."""
    options = {"sequence_parallel_size": sequence_size, **options}
    return [
        f"--trainer.strategy={STRATEGY}",
        *(f"--trainer.strategy.{name}={value}" for name, value in options.items()),
    ]


def text_run(corpus, folder, name, *more, recipe="recipes.text_lm", verb="fit", **changes):
    """Returns a tiny run of a text recipe: its name, recipe and arguments."""
    defaults = {
        "trainer__max_steps": 20,
        "trainer__val_check_interval": 10,
        "trainer__enable_progress_bar": "false",
        "trainer__gradient_clip_val": 1.0,
        "model__model_options__dropout": 0,
        "model__model_options__num_layers": 2,
    }
    args = arguments(corpus, folder / name, **(defaults | changes))
    return name, recipe, [verb, *args, *map(str, more)]


def run_all(folder, runs, *, world_size):
    """Runs on so many processes; returns what each process said of runs that failed."""
    processes = fork_ranks(folder, run_each, folder, runs, world_size=world_size)
    said = {name: sorted(folder.glob(f"{name}.error.*")) for name, _, _ in runs}
    ended = {name: (folder / f"{name}.ended").exists() for name in said}
    return {
        name: [file.read_text() for file in files] if ended[name] else [x.said for x in processes]
        for name, files in said.items()
    }


def run_each(folder, runs):
    """Runs on this process, of which the others do the same."""
    rank = os.environ["RANK"]
    for name, recipe, args in runs:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                importlib.import_module(recipe).main(args)
        except SystemExit:
            # Refused, by all processes if all is well.
            (folder / f"{name}.error.{rank}").write_text(said.getvalue())
        if rank == "0":
            (folder / f"{name}.ended").touch()
