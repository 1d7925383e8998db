"""What `longnet-zoo bench` does: progress, lines, JSON and pictures around `compare`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import ComparisonConfig, Lengths, compare, describe, header, panels
from .measure import choose_device, environment, make_progress
from .picture import check_matplotlib, draw, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_bench", "run_bench"]


def run_bench(
    config: ComparisonConfig, *, output: Path | None = None, picture: bool = True
) -> list[Lengths]:
    """Prints the times length by length; writes OUTPUT.json, OUTPUT.svg and OUTPUT.png if asked.

    Args:
        config: What to compare.
        output: Path of the files, without a suffix.
        picture: Whether to draw; JSON is written anyway.

    Raises:
        ValueError: If `output` has a suffix.
        RuntimeError: If the device is not there, a result is wrong, or a picture is asked for
            without matplotlib.
        NotImplementedError: If the named backend cannot serve the call, with the reason.
    """
    if output is not None:
        if output.suffix:
            raise ValueError(f"output names three files, so it must have no suffix, got {output}.")
        if picture:
            check_matplotlib()
    results: list[Lengths] = []
    with make_progress() as progress:
        calls = len(config.kinds) * config.num_seq_lens * (config.num_iter + 1)
        task = progress.add_task("checking", total=calls)

        def show(kind: str) -> None:
            progress.update(task, advance=1, description=kind)

        for result in compare(config, on_run=show):
            if not results:
                sys.stdout.write(header(config))
            results.append(result)
            sys.stdout.write(describe(result) + "\n")
            sys.stdout.flush()
    if output is not None:
        document = {
            "benchmark": "bench",
            "settings": asdict(config),
            "environment": environment(choose_device(config.device)),
            "is_complete": True,
            "cells": [asdict(result) for result in results],
        }
        path = output.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        written = [path, *(save_picture(draw_bench(document), output) if picture else ())]
        sys.stdout.writelines(f"wrote {path}\n" for path in written)
    return results


def draw_bench(document: dict[str, Any]) -> Figure:
    """Draws what `run_bench` has written."""
    settings, machine = document["settings"], document["environment"]
    facts = f"{settings['max_seq_len']:,} tokens a batch, {settings['num_heads']} heads"
    return draw(
        panels([Lengths(**cell) for cell in document["cells"]]),
        title="dilated against vanilla attention, causal, forward",
        facts=f"{facts}, {settings['dtype']}, {machine['device']}, PyTorch {machine['torch']}",
    )
