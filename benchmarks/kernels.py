"""Kernels: dilated attention by each backend, against dense attention at equal attended pairs.

The work is fixed by the pattern: about N * sum(w / r^2) / 2 causal pairs per head, two matrix
multiply-adds per pair and channel forward and five more backward. Dense attention gets the sequence
length at which it attends as many pairs; the ratio of the FLOP/s achieved says what dilation costs.
The usual pipeline (gather, attend, scatter, stack, mix; `pipelines.py`) is compared by time and
memory, bare kernel calls on contiguous blocks are the least time that PyTorch's kernel can take,
and packages with dilated attention run where they are installed. All contenders of a size run in
turn in one process; quote the ratios, not the seconds.

    python -m benchmarks.kernels --output benchmarks/results/kernels-cpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import FLOPS, PASSES, Contender, Run, Shape, contenders_of
from benchmarks.measure import (
    Timing,
    alternate,
    at_least_1,
    choose_device,
    make_parser,
    peak_extra_mib,
    timing_ms,
)
from benchmarks.record import Cell, Record, reason_of, run_programme, stop_if_broken
from longnet_zoo.bench import make_progress, reading, time_once
from longnet_zoo.ops import BACKENDS, DilatedPattern
from longnet_zoo.ops.kernels.preference import write_preference

__all__ = ["main"]

# Kinds of contenders that others are compared with.
REFERENCES = ("dense", "usual", "bare")


def main(options: argparse.Namespace) -> int:
    """Runs every size; returns 1 if a contender was wrong."""
    if options.write_preference:
        files = options.write_preference
        rows = []
        for file in files:
            with reading(file):
                rows += preference_rows(json.loads(file.read_text(encoding="utf-8")))
        write_preference(rows)
        return 0
    device = choose_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {
        name: getattr(options, name)
        for name in ("seq_lens", "shapes", "segment_lengths", "dilation_rates", "rounds")
    }
    settings |= {"backends": options.backends, "limit_s": options.limit_s, "dtype": dtype}
    record = Record(
        "kernels", settings, device=device, output=options.output, resume=options.resume
    )
    pattern = DilatedPattern(
        segment_lengths=tuple(options.segment_lengths), dilation_rates=tuple(options.dilation_rates)
    )
    for seq_len in options.seq_lens:
        for num_heads, head_dim in options.shapes:
            shape = Shape(
                seq_len=seq_len,
                num_heads=num_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=device,
                pattern=pattern,
            )
            measure(shape, options, record)
    record.complete()
    return int(any(cell.get("reason", "").startswith("wrong") for cell in record.cells))


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A contender that is right and runs: its functions and peak MiB, by pass."""

    contender: Contender
    runs: dict[str, Run]
    peak_mib: dict[str, float]


def measure(shape: Shape, options: argparse.Namespace, record: Record) -> None:
    """Measures the contenders of a size that have no cell yet, in turn, and records them."""
    size = {"seq_len": shape.seq_len, "num_heads": shape.num_heads, "head_dim": shape.head_dim}
    title = f"{shape.seq_len:,} tokens, {shape.num_heads} x {shape.head_dim}"
    contenders = contenders_of(shape, tuple(options.backends))
    done = {x.name: record.find(contender=x.name, **size) for x in contenders}
    missing = [name for name, cell in done.items() if cell is None]
    if not missing:
        return
    # With those that others are compared with, so that ratios are of one process.
    running = [
        x
        for x in contenders
        if x.name in missing or (x.kind in REFERENCES and "reason" not in done[x.name])
    ]

    def leave_out(contender: Contender, reason: str) -> None:
        if shape.device.type == "cuda":
            torch.cuda.empty_cache()
        if contender.name in missing:
            record.add([{**start_cell(contender, size), "reason": reason}])
            print(f"{title}: {contender.name} does not run: {reason}", flush=True)

    with make_progress() as progress:
        task = progress.add_task(title, total=len(running) * (1 + options.rounds * len(PASSES)))

        def show(name: str) -> None:
            progress.update(task, advance=1, description=f"{title}: {name}")

        ready = prepare_all(running, options.limit_s, leave_out, show)
        timings = time_all(ready, options.rounds, leave_out, show)
    cells = []
    for name, found in ready.items():
        cell = start_cell(found.contender, size)
        for passed in PASSES:
            timing = timings[f"{name}, {passed}"]
            flops = FLOPS[passed] * shape.head_dim * found.contender.pairs
            cell[passed] = {
                **timing_ms(timing),
                "peak_extra_mib": found.peak_mib[passed],
                "tflops_per_s": flops / timing.median_s / 1e12,
            }
        cells.append(cell)
    add_ratios(cells)
    show_table(title, cells)
    record.add(cell for cell in cells if cell["contender"] in missing)


def prepare_all(
    running: list[Contender],
    limit_s: float,
    leave_out: Callable[[Contender, str], None],
    show: Callable[[str], None],
) -> dict[str, Ready]:
    """Prepares the contenders; those that do not run are left out with the reason.

    Raises:
        Crash: If a contender broke the device, on which nothing runs any more.
    """
    ready = {}
    for contender in running:
        show(contender.name)
        try:
            ready[contender.name] = prepare(contender, limit_s)
        except Exception as error:
            leave_out(contender, reason_of(error))
            stop_if_broken(contender.name, error)
    return ready


def time_all(
    ready: dict[str, Ready],
    rounds: int,
    leave_out: Callable[[Contender, str], None],
    show: Callable[[str], None],
) -> dict[str, Timing]:
    """Times all passes in turn, without those for which memory does not suffice in the end."""
    while True:
        runs = {
            f"{name}, {passed}": run
            for name, found in ready.items()
            for passed, run in found.runs.items()
        }
        try:
            return alternate(runs, rounds=rounds, warmup=0, on_run=show)
        except torch.OutOfMemoryError:
            # Each fits alone, but memory is in pieces by now.
            largest = max(ready, key=lambda name: max(ready[name].peak_mib.values()))
            leave_out(ready.pop(largest).contender, "out of memory beside the others")


def start_cell(contender: Contender, size: dict[str, int]) -> Cell:
    """What a cell says besides figures."""
    return {**size, "contender": contender.name, "kind": contender.kind, **contender.facts}


def prepare(contender: Contender, limit_s: float) -> Ready:
    """Checks, warms up and weighs a contender; an exception is why it does not run."""
    problem = contender.check()
    if problem:
        raise ArithmeticError(problem)
    runs = contender.make()
    peak_mib = {}
    for passed, run in runs.items():
        run()  # compiles and tunes
        elapsed_s = time_once(run)
        if elapsed_s > limit_s:
            raise TimeoutError(f"{passed} takes {elapsed_s:.0f} s a call, over the limit {limit_s}")
        peak_mib[passed] = peak_extra_mib(run)
    return Ready(contender=contender, runs=runs, peak_mib=peak_mib)


def add_ratios(cells: list[Cell]) -> None:
    """Adds what each figure is relative to others of the same run."""
    dense = [cell for cell in cells if cell["kind"] == "dense"]
    others = {cell["kind"]: cell for cell in cells if cell["kind"] in ("usual", "bare")}
    for cell in cells:
        for passed in PASSES:
            figures, ratios = cell[passed], {}
            if dense:
                best = max(other[passed]["tflops_per_s"] for other in dense)
                ratios["flops_over_dense"] = figures["tflops_per_s"] / best
            if "usual" in others:
                usual = others["usual"][passed]
                ratios["speed_over_usual"] = usual["median_ms"] / figures["median_ms"]
                ratios["memory_over_usual"] = figures["peak_extra_mib"] / usual["peak_extra_mib"]
            if "bare" in others:
                bare = others["bare"][passed]
                ratios["time_over_bare"] = figures["median_ms"] / bare["median_ms"]
            figures["ratios"] = ratios


def show_table(title: str, cells: list[Cell]) -> None:
    """Prints one line for each contender and pass."""
    print(f"\n{title}")
    print(f"{'':48}{'ms':>10}{'TFLOP/s':>9}{'MiB':>8}{'of dense':>10}{'vs usual':>10}{'memory':>8}")
    for passed in PASSES:
        for cell in cells:
            figures = cell[passed]
            ratios = [
                f"{figures['ratios'][name]:.2f}" if name in figures["ratios"] else "-"
                for name in ("flops_over_dense", "speed_over_usual", "memory_over_usual")
            ]
            print(
                f"{passed:18}{cell['contender']:30}{figures['median_ms']:10.2f}"
                f"{figures['tflops_per_s']:9.3f}{figures['peak_extra_mib']:8.0f}"
                f"{ratios[0]:>10}{ratios[1]:>10}{ratios[2]:>8}",
                flush=True,
            )


def preference_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What `backend="auto"` is decided by; the backward alone is the rest of forward + backward."""
    machine, rows = document["environment"], []
    for cell in document["cells"]:
        if cell["kind"] != "dilated" or "reason" in cell:
            continue
        forward_ms, both_ms = (cell[passed]["median_ms"] for passed in PASSES)
        for passed, ms in (("forward", forward_ms), ("backward", both_ms - forward_ms)):
            rows.append(
                {
                    "device": machine["device"],
                    "capability": machine["capability"],
                    "dtype": document["settings"]["dtype"],
                    "head_dim": cell["head_dim"],
                    "pass": passed,
                    "backend": cell["backend"],
                    "ms": ms,
                    "date": machine["date"],
                }
            )
    return rows


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--seq-lens", type=at_least_1, nargs="+", default=[32768], help="tokens")
    parser.add_argument(
        "--shapes", type=read_shape, nargs="+", default=[(8, 64)], help="HEADSxHEAD_DIM, as 8x64"
    )
    parser.add_argument("--segment-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dilation-rates", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--backends", nargs="*", choices=BACKENDS, default=[], help="default: every one"
    )
    parser.add_argument(
        "--limit-s", type=float, default=20.0, help="a slower call is not timed, in seconds"
    )
    parser.add_argument(
        "--write-preference",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='only order the kernels that backend="auto" tries, by these results',
    )
    return parser.parse_args(arguments)


def read_shape(text: str) -> tuple[int, int]:
    """Reads HEADSxHEAD_DIM."""
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be HEADSxHEAD_DIM such as 12x64, got {text!r}")
    return int(sizes[0]), int(sizes[1])


if __name__ == "__main__":
    run_programme(main, read_options())
