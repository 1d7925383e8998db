"""Pictures of results, SVG and PNG beside the JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import PASSES
from benchmarks.tables import Document, figures, flops_unit
from longnet_zoo.bench import Panel, draw, draw_bench, reading, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DRAWN", "draw_result"]


def draw_result(file: Path) -> tuple[Path, ...]:
    """Draws a JSON file of results; returns the pictures, none if there is nothing to draw.

    Raises:
        ValueError: If the file is not what a programme has written.
        RuntimeError: If matplotlib is not installed.
    """
    with reading(file):
        document = json.loads(file.read_text(encoding="utf-8"))
        drawn = DRAWN.get(document["benchmark"])
        if drawn is None or not figures(document):
            return ()
    return save_picture(drawn(document), file)


def _draw(document: Document, panels: list[Panel], title: str) -> Figure:
    machine = document["environment"]
    facts = f"{machine['device']}, {document['settings']['dtype']}, PyTorch {machine['torch']}"
    return draw(panels, title=title, facts=facts)


def _draw_kernels(document: Document) -> Figure:
    """FLOP/s of both passes, and memory, at the last size."""
    last = figures(document)[-1]
    size = ("seq_len", "num_heads", "head_dim")
    cells = [x for x in figures(document) if all(x[name] == last[name] for name in size)]
    unit, factor = flops_unit(document)
    panels = [
        Panel(
            title=f"{unit}, {passed}",
            bars={_contender(cell): factor * cell[passed]["tflops_per_s"] for cell in cells},
        )
        for passed in PASSES
    ]
    # Dense attention of as many pairs has a shorter sequence, whose memory is no comparison.
    dilated = [cell for cell in cells if "dense_len" not in cell]
    memory = {cell["contender"]: cell[PASSES[1]]["peak_extra_mib"] for cell in dilated}
    panels.append(Panel(title="peak MiB, forward+backward", bars=memory))
    heads = f"{last['num_heads']} heads x {last['head_dim']}"
    return _draw(document, panels, f"Attention at equal pairs: {last['seq_len']:,} tokens, {heads}")


def _contender(cell: dict[str, Any]) -> str:
    length = f", {cell['dense_len']:,} tokens" if "dense_len" in cell else ""
    return f"{cell['contender']}{length}"


def _draw_length(document: Document) -> Figure:
    panels = []
    for title, figure in (
        ("microseconds per token", "us_per_token"),
        ("peak MiB", "peak_extra_mib"),
    ):
        lines = {
            passed: [
                (cell["seq_len"], cell[figure])
                for cell in figures(document)
                if cell["pass"] == passed
            ]
            for passed in PASSES
        }
        panels.append(
            Panel(
                title=title,
                lines={name: points for name, points in lines.items() if points},
                x_label="sequence length (tokens)",
                y_scale="linear" if figure == "us_per_token" else "log",
            )
        )
    return _draw(document, panels, "One attention layer, by length")


def _draw_streaming(document: Document) -> Figure:
    """Memory while reading, and the time of a token after ever more of them."""
    memory: dict[str, list[tuple[float, float]]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for cell in figures(document):
        if cell["part"] == "reading":
            name = f"in chunks of {cell['chunk_size']:,}"
            memory.setdefault(name, []).append((cell["position"], cell["resident_mib"]))
        elif cell["part"] == "writing":
            name = "with a cache" if cell["is_cached"] else "one pass for each"
            times.setdefault(name, []).append((cell["position"], cell["median_ms"]))
    panels = [
        Panel(title=title, lines=lines, x_label="tokens read before", y_scale=scale)
        for title, lines, scale in (
            ("resident memory while reading, MiB", memory, "linear"),
            ("milliseconds to write a token", times, "log"),
        )
        if lines
    ]
    return _draw(document, panels, f"Streaming through {document['settings']['model']}")


def _draw_pretrained(document: Document) -> Figure:
    """Bits per byte by context, without those of random weights, which would flatten the rest."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in figures(document):
        if cell["context"] is not None and cell["way"] != "random":
            lines.setdefault(cell["way"], []).append((cell["context"], cell["bits_per_byte"]))
    panel = Panel(title="bits per byte", lines=lines, x_label="context (bytes)", y_scale="linear")
    machine, model = document["environment"], document["settings"]["model"]
    facts = f"{machine['device']}, PyTorch {machine['torch']}"
    return draw([panel], title=f"{model}: held-out Python files", facts=facts)


def _draw_models(document: Document) -> Figure:
    cells = figures(document)
    panels = [
        Panel(title=title, bars={f"{x['case']}\n{x['mode']}": x[figure] for x in cells})
        for title, figure in (
            ("tokens per second", "tokens_per_s"),
            ("peak MiB beyond weights, optimizer", "peak_extra_mib"),
        )
    ]
    depth = document["settings"]["num_layers"]
    size = f", {depth} layers" if depth else ""
    return _draw(document, panels, f"A training step{size}")


# Programme -> what draws its results.
DRAWN: dict[str, Callable[[Document], Figure]] = {
    "kernels": _draw_kernels,
    "length": _draw_length,
    "streaming": _draw_streaming,
    "pretrained": _draw_pretrained,
    "models": _draw_models,
    "bench": draw_bench,
}
