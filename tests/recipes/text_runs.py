"""A tiny corpus and tiny runs, shared by the tests of the text recipes."""

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from recipes.text_data import TextDataModule

WORDS = ("def", "return", "import", "self", "class", "value", "index", "for", "in", "while", "None")

# Different in every file, since duplicates are dropped.
NUM_FILES = 40

# What differs between two runs of the same thing.
CLOCKS = ("tokens_per_second", "train_seconds")


def write_corpus(folder: Path) -> Path:
    """Writes about 40 kB of make-believe code."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(NUM_FILES):
        lines = [" ".join(draw.choices(WORDS, k=6)) for _ in range(25)]
        (folder / f"file_{number:02d}.py").write_text("\n".join(lines))
    return folder


def model_options(**changes: Any) -> dict[str, Any]:
    """Returns options that make any text model tiny."""
    return {
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "segment_lengths": [16, 48],
        "dilation_rates": [1, 2],
        "dropout": 0.1,
        **changes,
    }


def arguments(corpus: Path, run_dir: Path, **changes: Any) -> list[str]:
    """Returns command-line arguments of a tiny run, `section__name=value` changing one."""
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_steps": 12,
        "trainer__log_every_n_steps": 1,
        "trainer__val_check_interval": 5,
        "trainer__check_val_every_n_epoch": "null",
        "trainer__limit_val_batches": 3,
        "trainer__default_root_dir": run_dir,
        "model__optimization__warmup_steps": 2,
        "model__optimization__decay_steps": 20,
        "data__source": corpus,
        "data__seq_len": 64,
        "data__batch_size": 2,
    }
    options |= {f"model__model_options__{name}": x for name, x in model_options().items()}
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]


def last_checkpoint_every(steps: int) -> list[str]:
    """Returns the arguments that keep last.ckpt."""
    return [
        "--trainer.callbacks+=recipes.callbacks.LastCheckpoint",
        f"--trainer.callbacks.every_n_train_steps={steps}",
    ]


def read_rows(run_dir: Path, *, ignore: Sequence[str] = ()) -> list[dict[str, str]]:
    """Reads metrics.csv without what the clock says."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    left_out = {*CLOCKS, *ignore}
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def curve(run_dir: Path, name: str) -> dict[int, float]:
    """Returns a metric by step."""
    return {int(row["step"]): float(row[name]) for row in read_rows(run_dir) if row[name]}


def make_data(corpus: Path, **options: Any) -> TextDataModule:
    """Makes the data of a tiny run from Python."""
    return TextDataModule(source=str(corpus), **{"seq_len": 64, "batch_size": 2, **options})


def make_trainer(run_dir: Path, **options: Any) -> L.Trainer:
    """Makes a quiet trainer of three steps."""
    defaults = {
        "accelerator": "cpu",
        "default_root_dir": run_dir,
        "max_steps": 3,
        "max_epochs": -1,
        "limit_val_batches": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    return L.Trainer(**(defaults | options))
