"""What a pretraining run has read and cost, and how it learned.

    python -m benchmarks.pretraining runs/pretrain_pystdlib \
        --output benchmarks/results/pretraining-dilated.json

Tokens and FLOPs of every step are counted from the run's own options. Losses are what the recipe
logged: of training batches the mean between two rows, of validation each.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import Parser, check_output, finish
from benchmarks.record import run_programme
from longnet_zoo.planner import Network, describe
from recipes.context_warmup import ContextWarmup
from recipes.text_lm import TextLM

__all__ = ["run_document"]

NUM_ROWS = 12


def main(options: argparse.Namespace) -> int:
    """Writes what is known of a run."""
    if options.output is not None:
        check_output(options.output)
    finish(run_document(options.run), options.output)
    return 0


def run_document(run: Path) -> dict[str, Any]:
    """Facts and curve of a folder of `recipes.text_lm`.

    Raises:
        ValueError: If there is no such run.
    """
    files = (run / "config.yaml", run / "checkpoints" / "last.ckpt", run / "metrics.csv")
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"RUN must be the folder of a finished run of recipes.text_lm, got no {file}."
            )
    config = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    checkpoint = torch.load(files[1], map_location="cpu", weights_only=True)
    (seconds,) = (
        state["train_seconds"]
        for state in checkpoint["callbacks"].values()
        if "train_seconds" in state
    )
    batches, model = list(_batches(config, checkpoint["global_step"])), config["model"]
    name = model.get("model_name") or TextLM.default_model
    network = describe(name, model.get("model_options") or {})
    costs = {context: _training_flops(network, context) for _, context in set(batches)}
    tokens = list(itertools.accumulate(rows * context for rows, context in batches))
    flops = list(itertools.accumulate(rows * costs[context] for rows, context in batches))
    settings = {
        "model": name,
        "segment_lengths": network.pattern.segment_lengths,
        "dilation_rates": network.pattern.dilation_rates,
        "precision": config["trainer"]["precision"],
        "optimizer": model["optimization"]["optimizer"],
        "lr": model["optimization"]["lr"],
        "start": batches[0][1],
        "seq_len": config["data"]["seq_len"],
        "steps": len(batches),
        "tokens": tokens[-1],
        "flops": flops[-1],
        "hours": round(seconds / 3600, 2),
    }
    cells = [
        {
            "step": step,
            "context": batches[step - 1][1],
            "tokens": tokens[step - 1],
            "flops": flops[step - 1],
            **losses,
        }
        for step, losses in _curve(files[2], len(batches))
    ]
    return {"benchmark": "pretraining", "settings": settings, "cells": cells}


def _batches(config: dict[str, Any], num_steps: int) -> Iterator[tuple[int, int]]:
    """Rows and context of every step."""
    data, options = config["data"], config["model"]["context_warmup"]
    whole = data["batch_size"], data["seq_len"]
    if options is None:
        yield from itertools.repeat(whole, num_steps)
        return
    warmup = ContextWarmup(**options)
    batch = {"tokens": torch.empty(whole, dtype=torch.bool)}
    for step in range(num_steps):
        rows, context = warmup.cut(batch, step)["tokens"].shape
        yield rows, context


def _training_flops(network: Network, seq_len: int) -> int:
    """FLOPs of one sequence, forward and backward."""
    attention = sum(
        network.pattern.flops(
            seq_len, network.num_heads, network.head_dim, is_causal=network.is_causal
        )
    )
    return 3 * network.linear_flops(seq_len) + network.num_layers * attention


def _curve(file: Path, num_steps: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps done, and bits per byte there: rows at even distances, and every validation."""
    train: dict[int, float] = {}
    val: dict[int, float] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            for split, found in (("train", train), ("val", val)):
                if row.get(f"{split}_bits_per_byte"):
                    # A row has the number of steps before it.
                    found[int(row["step"]) + 1] = float(row[f"{split}_bits_per_byte"])
    distance = max(1, num_steps // NUM_ROWS)
    rows = {*range(distance, num_steps + 1, distance), *val, num_steps}
    before = 0
    for step in sorted(x for x in rows if x <= num_steps):
        since = [bits for logged, bits in train.items() if before < logged <= step]
        losses = {"val_bits_per_byte": val[step]} if step in val else {}
        if since:
            losses["train_bits_per_byte"] = sum(since) / len(since)
            before = step
        if losses:
            yield step, losses


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
