"""Length: time and memory of one attention layer per token, from 2^13 tokens to what fits.

Dilated attention is linear in the length once a sequence is longer than its longest segment: the
slope of log time over log length is then 1, where dense attention has 2. Every length runs in turn
with the shortest one, so that its ratio is of one process and one minute.

With `--piece-len` the layer takes that many tokens at a time, in the backward pass too. No segment
crosses a piece, so that the result is the same; what is in memory for all tokens is the input, the
output and their gradients.

    python -m benchmarks.length --output benchmarks/results/length-cpu.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import PASSES, Shape, check_backend
from benchmarks.measure import (
    DTYPES,
    alternate,
    at_least_1,
    available_mib,
    choose_device,
    largest_excess,
    make_parser,
    peak_extra_mib,
    timing_ms,
)
from benchmarks.record import Record, reason_of, run_programme, stop_if_broken
from longnet_zoo.bench import make_progress
from longnet_zoo.layers import DilatedAttention
from longnet_zoo.ops import BACKENDS, DilatedPattern

Run = Callable[[], Any]


def main(options: argparse.Namespace) -> int:
    """Runs every length; returns 1 if one failed, or a result is wrong."""
    device = choose_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    pattern = DilatedPattern(
        segment_lengths=tuple(options.segment_lengths), dilation_rates=tuple(options.dilation_rates)
    )
    check_piece_len(options.piece_len, pattern)
    names = ("num_heads", "head_dim", "segment_lengths", "dilation_rates", "rounds", "backend")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"piece_len": options.piece_len, "dtype": dtype, "min_seq_len": options.min_seq_len}
    record = Record("length", settings, device=device, output=options.output, resume=options.resume)
    shape = Shape(
        seq_len=options.min_seq_len,
        num_heads=options.num_heads,
        head_dim=options.head_dim,
        dtype=dtype,
        device=device,
        pattern=pattern,
    )
    problem = check_backend(options.backend, shape) or check_pieces(shape, options.backend)
    if problem:
        print(f"not timed: {problem}")
        return 1
    layer = make_layer(shape, options.backend)
    longest = {"forward": options.max_seq_len, "forward+backward": options.max_backward_seq_len}
    for passed in PASSES:
        measure(layer, shape, passed, longest[passed], options, record)
    show_slopes(record)
    record.complete()
    return int(record.has_failed)


def check_piece_len(piece_len: int | None, pattern: DilatedPattern) -> None:
    """Refuses pieces that a segment would cross."""
    longest = pattern.segment_lengths[-1]
    if piece_len is not None and not (
        piece_len > 0 and piece_len % longest == 0 and pattern.is_nested
    ):
        raise ValueError(
            f"--piece-len must be a multiple of the longest segment, which all others divide, got "
            f"{piece_len} and segment_lengths={pattern.segment_lengths}. Take {longest}."
        )


def make_layer(shape: Shape, backend: str) -> DilatedAttention:
    """A causal attention layer with its projections."""
    layer = DilatedAttention(
        embed_dim=shape.num_heads * shape.head_dim,
        num_heads=shape.num_heads,
        pattern=shape.pattern,
        is_causal=True,
        backend=backend,
    )
    return layer.to(shape.device, DTYPES[shape.dtype][0])


def make_run(layer: DilatedAttention, seq_len: int, passed: str, piece_len: int | None) -> Run:
    """A function that runs the layer on fixed random input, piece by piece."""
    weight = layer.out_proj.weight
    shape = (1, seq_len, weight.shape[0])
    x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    piece_len = piece_len or seq_len
    if passed == "forward":
        return partial(forward, layer, x, piece_len)
    return partial(forward_backward, layer, x, torch.randn_like(x), piece_len)


@torch.no_grad()
def forward(layer: DilatedAttention, x: Tensor, piece_len: int) -> Tensor:
    """The output of the layer."""
    if piece_len >= x.shape[1]:
        return layer(x)
    out = torch.empty_like(x)
    for piece, place in zip(x.split(piece_len, 1), out.split(piece_len, 1), strict=True):
        place.copy_(layer(piece))
    return out


def forward_backward(
    layer: DilatedAttention, x: Tensor, out_grad: Tensor, piece_len: int
) -> Tensor:
    """The gradient of the input; those of the weights are computed and dropped."""
    x_grad = torch.empty_like(x)
    pieces = (tensor.split(piece_len, 1) for tensor in (x, out_grad, x_grad))
    for piece, piece_out_grad, place in zip(*pieces, strict=True):
        leaf = piece.detach().requires_grad_()
        layer(leaf).backward(piece_out_grad)
        place.copy_(leaf.grad)
    layer.zero_grad()
    return x_grad


def check_pieces(shape: Shape, backend: str) -> str | None:
    """Compares two pieces with the whole, output and gradient, with short segments."""
    small = DilatedPattern(segment_lengths=(16, 64), dilation_rates=(1, 4))
    layer = make_layer(Shape(**{**vars(shape), "pattern": small}), backend)
    x, out_grad = torch.randn(2, 1, 100, shape.num_heads * shape.head_dim).to(
        shape.device, DTYPES[shape.dtype][0]
    )
    found = forward(layer, x, 64), forward_backward(layer, x, out_grad, 64)
    expected = forward(layer, x, 100), forward_backward(layer, x, out_grad, 100)
    for name, piecewise, whole in zip(("output", "gradient"), found, expected, strict=True):
        excess = largest_excess(piecewise, whole, shape.dtype)
        if not excess <= 1:
            return f"{name} in pieces is off by {excess:.3g} times the tolerance"
    return None


def measure(
    layer: DilatedAttention,
    shape: Shape,
    passed: str,
    max_seq_len: int,
    options: argparse.Namespace,
    record: Record,
) -> None:
    """Measures one pass, length by length, until memory ends."""
    shortest = make_run(layer, options.min_seq_len, passed, options.piece_len)
    seq_len, needed_mib = options.min_seq_len, 0.0
    while seq_len <= max_seq_len:
        key = {"pass": passed, "seq_len": seq_len}
        done = record.find(**key)
        if done is None:
            error = None
            try:
                figures = measure_length(layer, shortest, key, needed_mib, shape, options)
            except RuntimeError as failure:
                error, figures = failure, {"reason": reason_of(failure)}
            done = {**key, **figures}
            record.add([done])
            print(line_of(done), flush=True)
            if error is not None:
                stop_if_broken(f"{passed} of {seq_len:,} tokens", error)
        if "reason" in done:
            return
        needed_mib = 2 * (done["peak_extra_mib"] + done["input_mib"])
        seq_len *= 2


def measure_length(
    layer: DilatedAttention,
    shortest: Run,
    key: dict[str, Any],
    needed_mib: float,
    shape: Shape,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Figures of one length, or the reason why it is not tried."""
    seq_len, passed = key["seq_len"], key["pass"]
    free_mib = available_mib(shape.device)
    # A CPU out of memory ends the process, and others with it.
    if shape.device.type == "cpu" and needed_mib > 0.8 * free_mib:
        return {
            "reason": f"out of memory: needs about {needed_mib:,.0f} MiB, {free_mib:,.0f} are free"
        }
    run = make_run(layer, seq_len, passed, options.piece_len)
    run()
    peak = peak_extra_mib(run)
    runs = {"shortest": shortest}
    if seq_len > options.min_seq_len:
        runs["this"] = run
    with make_progress() as progress:
        task = progress.add_task(f"{passed}, {seq_len:,}", total=len(runs) * options.rounds)
        timings = alternate(
            runs, rounds=options.rounds, warmup=0, on_run=lambda _: progress.advance(task)
        )
    timing = timings.get("this", timings["shortest"])
    per_token = timing.median_s / seq_len
    num_inputs = 1 if passed == "forward" else 2
    return {
        **timing_ms(timing),
        "us_per_token": 1e6 * per_token,
        "peak_extra_mib": peak,
        "kib_per_token": 1024 * peak / seq_len,
        "input_mib": num_inputs * seq_len * layer.out_proj.weight[0].nbytes / 2**20,
        "ratios": {
            "time_per_token_over_shortest": per_token
            * options.min_seq_len
            / timings["shortest"].median_s,
        },
    }


def line_of(cell: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"{cell['pass']:18}{cell['seq_len']:12,}"
    if "reason" in cell:
        return f"{start}  {cell['reason']}"
    ratio = cell["ratios"]["time_per_token_over_shortest"]
    return (
        f"{start}{cell['median_ms']:12.1f} ms{cell['us_per_token']:9.3f} us/token"
        f"{cell['kib_per_token']:9.2f} KiB/token{ratio:7.2f} of the shortest's time per token"
    )


def slopes(cells: list[dict[str, Any]], passed: str, min_seq_len: int) -> dict[str, float]:
    """Slopes of log time and log memory over log length, of lengths from `min_seq_len` on.

    Empty with fewer than two lengths.
    """
    used = [
        cell
        for cell in cells
        if cell["pass"] == passed and "reason" not in cell and cell["seq_len"] >= min_seq_len
    ]
    if len(used) < 2:
        return {}
    x = [math.log(cell["seq_len"]) for cell in used]
    return {
        name: _slope(x, [math.log(cell[figure]) for cell in used])
        for name, figure in (("time", "median_ms"), ("memory", "peak_extra_mib"))
    }


def _slope(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def show_slopes(record: Record) -> None:
    """Prints and keeps the slopes, from the longest segment on."""
    longest = record.document["settings"]["segment_lengths"][-1]
    record.document["slopes"] = {}
    for passed in PASSES:
        found = slopes(record.cells, passed, longest)
        record.document["slopes"][passed] = found
        if found:
            print(
                f"{passed}: time grows as N^{found['time']:.2f}, memory as N^{found['memory']:.2f}"
                f" from N = {longest:,} on"
            )


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--min-seq-len", type=at_least_1, default=8192, help="tokens")
    parser.add_argument("--max-seq-len", type=at_least_1, default=131072, help="tokens, forward")
    parser.add_argument(
        "--max-backward-seq-len", type=at_least_1, default=65536, help="tokens, forward + backward"
    )
    parser.add_argument("--piece-len", type=int, help="tokens that the layer takes at a time")
    parser.add_argument("--num-heads", type=at_least_1, default=8)
    parser.add_argument("--head-dim", type=at_least_1, default=64)
    parser.add_argument("--segment-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dilation-rates", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
