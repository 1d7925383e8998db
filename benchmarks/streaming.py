"""Streaming: what reading and writing cost after few tokens, and after a million.

A cache keeps the keys of the current segments only, so memory and the time of a token must not grow
with what was read. Three parts:

- reading: memory and tokens/s while a file is scored, chunk by chunk. Chunks that end where all
  segments end leave nothing to keep, so the file is also read in chunks that cut every segment.
- writing: milliseconds of a token after ever more tokens, with the cache, and with one pass over
  all tokens for each.
- score: the same bits per byte as one pass over the beginning of the file, and the memory of both.

The file is what comes first in Python's standard library; the weights are random.

    python -m benchmarks.streaming --output benchmarks/results/streaming-cpu.json
"""

from __future__ import annotations

import argparse
import copy
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import (
    DTYPES,
    alternate,
    at_least_1,
    choose_device,
    largest_excess,
    make_parser,
    peak_extra_mib,
    timing_ms,
)
from benchmarks.record import Cell, Record, reason_of, run_programme, stop_if_broken
from longnet_zoo.bench import make_progress
from longnet_zoo.factory import create_model
from longnet_zoo.models.text_decoder import LongNetLM, LongNetLMConfig
from longnet_zoo.ops.sampling import Sampling, draw_tokens
from longnet_zoo.ops.streaming import StreamingCache
from longnet_zoo.registry import find_model
from longnet_zoo.text.score import FileScore, score_file
from longnet_zoo.tokenizers import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
# A round writes so many tokens after each position.
STEPS_PER_ROUND = 8
CHECKED_TOKENS = 1500
ONE_PASS = "one pass"


def main(options: argparse.Namespace) -> int:
    """Runs all parts; returns 1 if one failed, or the stream is wrong."""
    device = choose_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = make_model(options, dtype, device)
    pattern = model.config.pattern
    names = ("model", "num_bytes", "chunk_sizes", "score_bytes", "positions", "uncached_positions")
    settings = {name: getattr(options, name) for name in (*names, "rounds")}
    settings |= {
        "dtype": dtype,
        "segment_lengths": pattern.segment_lengths,
        "dilation_rates": pattern.dilation_rates,
    }
    record = Record(
        "streaming", settings, device=device, output=options.output, resume=options.resume
    )
    positions = (*options.positions, *options.uncached_positions)
    text = library_bytes(
        max(options.num_bytes, options.score_bytes, CHECKED_TOKENS, max(positions) + 1)
    )
    start_mib = resident_mib(device)
    problem = check_stream(model, text, min(options.chunk_sizes), dtype)
    if problem:
        print(f"not timed: {problem}")
        return 1
    # First what needs least, so that nothing set free before hides growth.
    for size in sorted(options.chunk_sizes):
        key = {"part": "reading", "chunk_size": size}
        read = partial(measure_reading, model, text[: options.num_bytes], size, start_mib)
        measure(record, key, read)
    measure(record, {"part": "writing"}, partial(measure_writing, model, text, options))
    scored = text[: options.score_bytes]
    measure(record, {"part": "score"}, partial(measure_score, model, scored, options.chunk_sizes))
    record.complete()
    return int(record.has_failed)


def make_model(options: argparse.Namespace, dtype: str, device: torch.device) -> LongNetLM:
    """The model with random weights, always the same."""
    if not isinstance(find_model(options.model).config, LongNetLMConfig):
        raise ValueError(
            f"--model must be a causal model of text, such as longnet_lm_tiny, got "
            f"{options.model!r}."
        )
    names = ("segment_lengths", "dilation_rates")
    given = {name: tuple(getattr(options, name)) for name in names if getattr(options, name)}
    torch.manual_seed(0)
    return create_model(options.model, **given).eval().to(device, DTYPES[dtype][0])


def library_bytes(num_bytes: int) -> bytes:
    """The first bytes of the standard library's Python files, in order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = b""
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"}.isdisjoint(file.parts):
            text += file.read_bytes()
        if len(text) >= num_bytes:
            return text[:num_bytes]
    raise ValueError(
        f"the standard library must hold the bytes to read, got {len(text):,} in Python files and "
        f"{num_bytes:,} asked for. Ask for fewer."
    )


def tokens_of(model: LongNetLM, text: bytes) -> Tensor:
    """Token ids on the device of the model, (1, num_bytes)."""
    ids = torch.from_numpy(TOKENIZER.encode_batch([text])[0].astype("int64"))
    return ids[None].to(next(model.parameters()).device)


@torch.no_grad()
def check_stream(model: LongNetLM, text: bytes, chunk_size: int, dtype: str) -> str | None:
    """Compares the features of chunks, and of single tokens, with those of one pass."""
    tokens = tokens_of(model, text[:CHECKED_TOKENS])
    whole = model.forward_features(tokens)
    cache = model.make_cache()
    num_steps = 20
    sizes = _sizes(tokens.shape[1] - num_steps, min(chunk_size, 400)) + [1] * num_steps
    pieces = [model.forward_features(x, cache=cache) for x in tokens.split(sizes, dim=1)]
    excess = largest_excess(torch.cat(pieces, dim=1), whole, dtype)
    if not excess <= 1:
        return f"features in chunks are off by {excess:.3g} times the tolerance"
    return None


def _sizes(total: int, size: int) -> list[int]:
    full, rest = divmod(total, size)
    return [size] * full + [rest] * bool(rest)


def measure(record: Record, key: dict[str, Any], find: Callable[[], Iterable[Cell]]) -> None:
    """Keeps and prints the cells of a part, or the reason why there are none."""
    if record.find(**key) is not None:
        return
    error = None
    try:
        cells = [{**key, **figures} for figures in find()]
    except RuntimeError as failure:
        error, cells = failure, [{**key, "reason": reason_of(failure)}]
    record.add(cells)
    for cell in cells:
        print(line_of(cell), flush=True)
    if error is not None:
        stop_if_broken(key["part"], error)


def measure_reading(model: LongNetLM, text: bytes, chunk_size: int, start_mib: float) -> list[Cell]:
    """Memory and speed at the chunks that reach powers of two, from the longest segment on."""
    device = next(model.parameters()).device
    longest = min(model.config.pattern.segment_lengths[-1], len(text))
    marks = [longest]
    while marks[-1] < len(text):
        marks.append(min(2 ** marks[-1].bit_length(), len(text)))
    cells: list[Cell] = []
    after_segment: list[float] = []
    # What is kept can be seen in a cache of ours only.
    cache = model.make_cache()
    with make_progress() as progress:
        task = progress.add_task(f"reading, {chunk_size:,}", total=len(text))
        start_s = time.perf_counter()

        def look(score: FileScore) -> None:
            elapsed_s = time.perf_counter() - start_s
            progress.update(task, completed=score.num_tokens)
            if score.num_tokens < longest:
                return
            after_segment.append(resident_mib(device))
            while len(cells) < len(marks) and marks[len(cells)] <= score.num_tokens:
                cells.append(
                    {
                        "position": marks[len(cells)],
                        "tokens_per_s": score.num_tokens / elapsed_s,
                        "resident_mib": after_segment[-1],
                        "extra_mib": after_segment[-1] - start_mib,
                        "cache_mib": cache.num_bytes / 2**20,
                        "ratios": {"most_over_first": max(after_segment) / after_segment[0]},
                    }
                )

        score_text(model, text, chunk_size, cache=cache, on_progress=look)
    return cells


def score_text(
    model: LongNetLM, text: bytes, chunk_size: int, *, cache: StreamingCache, **options: Any
) -> FileScore:
    """Scores a file with this content, with a cache that the caller can look at."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(model, "make_cache", lambda: cache),
    ):
        file = Path(folder) / "text"
        file.write_bytes(text)
        return score_file(model, file, TOKENIZER, chunk_size=chunk_size, **options)


def resident_mib(device: torch.device) -> float:
    """Memory that the process has now, or on a GPU what PyTorch has there, in MiB.

    Systems without /proc tell the most so far only.
    """
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        import resource

        # Bytes on macOS, elsewhere KiB.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    (line,) = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


@torch.no_grad()
def measure_writing(model: LongNetLM, text: bytes, options: argparse.Namespace) -> list[Cell]:
    """Time of one more token after each position, with the cache and without."""
    tokens = tokens_of(model, text)
    steps = {
        position: partial(
            model.generate,
            tokens[:, position : position + 1],
            max_new_tokens=1,
            temperature=1.0,
            cache=cache,
        )
        for position, cache in read_to(model, tokens, options.positions).items()
    }
    passes = {
        position: partial(write_without_cache, model, tokens[:, : position + 1])
        for position in sorted(options.uncached_positions)
    }
    timings = {
        True: alternate(steps, rounds=STEPS_PER_ROUND * options.rounds, warmup=2),
        False: alternate(passes, rounds=options.rounds),
    }
    shortest_s = timings[True][min(steps)].median_s
    return [
        {
            "position": position,
            "is_cached": is_cached,
            **timing_ms(timing),
            "ratios": {"time_over_shortest": timing.median_s / shortest_s},
        }
        for is_cached, found in timings.items()
        for position, timing in found.items()
    ]


def read_to(
    model: LongNetLM, tokens: Tensor, positions: Iterable[int]
) -> dict[int, StreamingCache]:
    """Caches that have read so many tokens, in order."""
    longest = model.config.pattern.segment_lengths[-1]
    cache, caches, start = model.make_cache(), {}, 0
    for position in sorted(positions):
        while start < position:
            stop = min(position, start + longest - start % longest)
            model.forward_features(tokens[:, start:stop], cache=cache)
            start = stop
        caches[position] = copy.deepcopy(cache)
    return caches


def write_without_cache(model: LongNetLM, tokens: Tensor) -> Tensor:
    """The next token, from one pass over all before it."""
    logits = model.forward_head(model.forward_features(tokens)[:, -1])
    return draw_tokens(logits, Sampling(temperature=1.0))


@torch.no_grad()
def measure_score(model: LongNetLM, text: bytes, chunk_sizes: Iterable[int]) -> list[Cell]:
    """Bits per byte of one pass and of chunks, and the memory of each."""
    tokens = tokens_of(model, text)
    first = torch.full_like(tokens[:, :1], TOKENIZER.eod_id)
    inputs = torch.cat([first, tokens[:, :-1]], dim=1)
    runs: dict[str, Callable[[], float]] = {
        ONE_PASS: lambda: _bits(float(model.loss(inputs, tokens, reduction="sum")), len(text))
    }
    for size in sorted(chunk_sizes):
        runs[f"chunks of {size:,}"] = partial(_bits_in_chunks, model, text, size)
    bits, peaks = {}, {}
    for way, run in runs.items():
        peaks[way] = peak_extra_mib(lambda way=way, run=run: bits.update({way: run()}))
    return [
        {
            "way": way,
            "num_bytes": len(text),
            "bits_per_byte": bits[way],
            "difference": bits[way] - bits[ONE_PASS],
            "peak_extra_mib": peaks[way],
            "ratios": {"memory_over_one_pass": peaks[way] / peaks[ONE_PASS]},
        }
        for way in runs
    ]


def _bits_in_chunks(model: LongNetLM, text: bytes, chunk_size: int) -> float:
    return score_text(model, text, chunk_size, cache=model.make_cache()).bits_per_byte


def _bits(nats: float, num_bytes: int) -> float:
    return FileScore(num_bytes=num_bytes, num_tokens=num_bytes, nats=nats).bits_per_byte


def line_of(cell: Cell) -> str:
    """One line of the tables."""
    part = f"{cell['part']:8}"
    if "reason" in cell:
        return f"{part}  {cell['reason']}"
    if part.startswith("reading"):
        return (
            f"{part} by {cell['chunk_size']:7,}{cell['position']:12,} tokens"
            f"{cell['resident_mib']:9.1f} MiB{cell['extra_mib']:8.1f} beyond the start"
            f"{cell['cache_mib']:7.2f} in the cache{cell['tokens_per_s']:10,.0f} tokens/s"
            f"{cell['ratios']['most_over_first']:7.3f} of the first segment's at most"
        )
    if part.startswith("writing"):
        way = "cache" if cell["is_cached"] else ONE_PASS
        return (
            f"{part} {way:10}{cell['position']:12,} tokens{cell['median_ms']:10.2f} ms a token"
            f"{cell['ratios']['time_over_shortest']:8.2f} of the shortest's"
        )
    return (
        f"{part} {cell['way']:18}{cell['bits_per_byte']:8.4f} bits per byte, "
        f"{cell['difference']:+.1e} from one pass{cell['peak_extra_mib']:9.1f} MiB"
    )


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="longnet_lm_tiny", help="a causal model of text")
    parser.add_argument("--segment-lengths", type=at_least_1, nargs="+", help="default: its own")
    parser.add_argument("--dilation-rates", type=at_least_1, nargs="+", help="default: its own")
    parser.add_argument("--num-bytes", type=at_least_1, default=1_000_000, help="to read")
    parser.add_argument(
        "--chunk-sizes",
        type=at_least_1,
        nargs="+",
        default=[6000, 32768],
        help="tokens read at once",
    )
    parser.add_argument(
        "--positions",
        type=at_least_1,
        nargs="+",
        default=[1000, 10_000, 100_000, 1_000_000],
        help="tokens before those that are written",
    )
    parser.add_argument(
        "--uncached-positions",
        type=at_least_1,
        nargs="+",
        default=[1000, 10_000],
        help="the same, for tokens written without a cache",
    )
    parser.add_argument(
        "--score-bytes", type=at_least_1, default=131_072, help="also scored in one pass"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
