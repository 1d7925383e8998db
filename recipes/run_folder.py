"""The folder of a run: what lies where, and what happens to it when a recipe runs again.

    runs/quickstart/
      config.yaml            every setting of the run
      metrics.csv            the curves
      metrics.json           what a classifier came to
      tensorboard/           the same curves for `tensorboard --logdir`
      checkpoints/last.ckpt  what `--ckpt_path last` resumes
      report.html, ...       written at the end
      previous/              the run before this one, if there was one

A new run moves the one before into `previous/`, and what was there goes: at most two are kept. Only
a run that saved a checkpoint pushes out another one that did, so a false start costs nothing. A run
that resumes a checkpoint of this folder keeps `metrics.csv` up to the checkpoint and appends.
"""

import argparse
import csv
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from longnet_zoo.bench import write_json

__all__ = [
    "CurveLogger",
    "check_resumed_folder",
    "make_room",
    "read_curves",
    "run_lines",
    "update_record",
]

# Only these are moved, in case somebody trains in a folder that holds other things.
_ENTRIES = (
    "config.yaml",
    "metrics.csv",
    "metrics.json",
    "tensorboard",
    "checkpoints",
    "model",
    "report.html",
    "report.png",
    "pattern.png",
    "val_confusion.png",
    "test_confusion.png",
    "val_examples.png",
    "test_examples.png",
    "retrieval.png",
    "queries.png",
    "captions.png",
    "adapter",
    "merged",
)


class CurveLogger(Logger):
    """Writes `metrics.csv`, a row for each call, at once, so that a kill loses nothing.

    Unlike Lightning's CSVLogger it goes on with a file that exists.

    Args:
        save_dir: Folder of the run.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self._save_dir = str(save_dir)
        self.path = Path(save_dir, "metrics.csv")
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Returns nothing: the folder itself is the run."""
        return ""

    @property
    def version(self) -> str:
        """Returns nothing: the folder itself is the run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Returns the folder of the run."""
        return self._save_dir

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Writes nothing: `config.yaml` and the checkpoint hold the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row; the first one replaces all of the same or a later step."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        if self._columns is None:
            # What a killed run logged after its last checkpoint comes again.
            self._columns, rows = _read_rows(self.path)
            kept = [old for old in rows if int(old["step"]) < (step or 0)]
            _write_rows(self.path, self._columns, kept)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            _write_rows(self.path, self._columns, _read_rows(self.path)[1])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)


def check_resumed_folder(run_dir: str | Path, *, ckpt_path: str | Path | None) -> None:
    """Refuses to resume a run that the next one would overwrite.

    Args:
        run_dir: Folder of the run.
        ckpt_path: Checkpoint that is resumed, if any.

    Raises:
        ValueError: The checkpoint belongs to the run in `previous/`.
    """
    previous = Path(run_dir, "previous")
    if ckpt_path is not None and previous.resolve() in Path(ckpt_path).resolve().parents:
        raise ValueError(
            f"a run resumes in its own folder, got ckpt_path={str(ckpt_path)!r} and "
            f"trainer.default_root_dir={str(run_dir)!r}, whose next run replaces {previous}. Move "
            "that folder elsewhere, and pass its new place as trainer.default_root_dir."
        )


def make_room(run_dir: str | Path, *, ckpt_path: str | Path | None) -> str | None:
    """Moves the run before into `previous/`, unless the new one resumes it.

    Args:
        run_dir: Folder of the run; made if there is none.
        ckpt_path: Checkpoint that is resumed, if any.

    Returns:
        What became of earlier runs, in a sentence; None if there was nothing to move.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    previous = folder / "previous"
    if ckpt_path is not None and folder.resolve() in Path(ckpt_path).resolve().parents:
        return None
    entries = [folder / name for name in _ENTRIES if (folder / name).exists()]
    if not entries:
        return None
    if _has_checkpoint(previous) and not _has_checkpoint(folder):
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return f"The run before had no checkpoint and is gone; {previous} stays as it is."
    had_previous = previous.exists()
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for entry in entries:
        entry.rename(previous / entry.name)
    lost = "; the run that lay there is gone" if had_previous else ""
    return f"The run before lies in {previous} now{lost}."


def _has_checkpoint(run_dir: Path) -> bool:
    return any(Path(run_dir, "checkpoints").glob("*"))


def read_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Reads `metrics.csv`.

    Args:
        path: The file.

    Returns:
        For each metric its steps, counted from 1, and values.
    """
    columns, rows = _read_rows(Path(path))
    return {
        name: [(int(row["step"]) + 1, float(row[name])) for row in rows if row[name] != ""]
        for name in columns
        if name != "step"
    }


def update_record(run_dir: str | Path, **entries: Any) -> None:
    """Writes entries of `metrics.json` and leaves others as they are.

    Args:
        run_dir: Folder of the run; made if there is none.
        **entries: What to write; a dict is merged with the one that is there.
    """
    path = Path(run_dir, "metrics.json")
    saved = json.loads(path.read_text()) if path.is_file() else {}
    for name, value in entries.items():
        saved[name] = {**saved.get(name, {}), **value} if isinstance(value, dict) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(saved, path)


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the columns and the complete rows of a CSV file; both empty if there is none."""
    if not path.is_file():
        return [], []
    with path.open(newline="") as file:
        # A row cut off by a kill has no line end, and its last number may lack digits.
        complete = [line for line in file if line.endswith("\n")]
    reader = csv.DictReader(complete)
    return list(reader.fieldnames or []), list(reader)


def _write_rows(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """Replaces a CSV file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(new, path)


def run_lines(trainer: L.Trainer, metrics: dict[str, Any], pictures: Sequence[str]) -> list[str]:
    """Returns what ends a report: how long the run took, and the files that it left.

    Args:
        trainer: The trainer of the run.
        metrics: Holds `steps`, `train_seconds` and `total_seconds`.
        pictures: Names of pictures, of which those that are there are listed.
    """
    folder = Path(trainer.default_root_dir)
    checkpoints = [getattr(x, "last_model_path", "") for x in trainer.checkpoint_callbacks]
    curves = folder / "metrics.csv"
    found = {
        "Pictures": [str(folder / name) for name in pictures if (folder / name).is_file()],
        "Checkpoint": [path for path in checkpoints if path][:1],
        "Curves": [f"{curves}, tensorboard --logdir {folder}"] if curves.is_file() else [],
    }
    return [
        f"{metrics['steps']:,} steps in {metrics['train_seconds'] / 60:.1f} minutes, "
        f"{metrics['total_seconds'] / 60:.1f} with validation and test",
        *(f"{title:<12} {', '.join(paths)}" for title, paths in found.items() if paths),
    ]
