"""Models: tokens a second and peak memory of a training step, with and without saving memory.

A step is forward, backward and AdamW, one sequence a batch, on random input and weights; on a GPU
in bfloat16 autocast. Modes: "plain"; "checkpointing" recomputes whole blocks
(`set_grad_checkpointing`); "memory saving" is the blockwise parallel Transformer
(`set_memory_saving`), a quarter of the tokens at a time or fewer, but at least 256. All modes of a
model run in turn in one process.

    python -m benchmarks.models --output benchmarks/results/models-cpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import (
    DTYPES,
    alternate,
    at_least_1,
    choose_device,
    make_parser,
    peak_extra_mib,
    timing_ms,
)
from benchmarks.record import Record, reason_of, run_programme, stop_if_broken
from benchmarks.slide_encoder import draw_slide
from longnet_zoo.bench import make_progress
from longnet_zoo.factory import create_model, model_info
from longnet_zoo.layers import MemorySaving
from longnet_zoo.registry import find_model

# Takes the model and its number of tokens.
MODES: dict[str, Callable[[Any, int], None]] = {
    "plain": lambda model, _: model.set_memory_saving(None),
    "checkpointing": lambda model, _: model.set_grad_checkpointing(True),
    "memory saving": lambda model, num_tokens: model.set_memory_saving(
        MemorySaving(chunk_size=chunk_size(num_tokens))
    ),
}
# Relative, of loss and norm of the gradient.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
CASES = ["longnet_lm_base:2048", "gigapath_slide_enc12l768d:4096", "longvit_small_patch32_1024"]

Loss = Callable[[], Tensor]


def chunk_size(num_tokens: int) -> int:
    """Tokens of a chunk: as by default, or fewer, since one chunk would be checkpointing."""
    return min(4096, max(256, num_tokens // 4))


def main(options: argparse.Namespace) -> int:
    """Runs every case; returns 1 if a step failed, or the modes of a model disagree."""
    device = choose_device(options.device)
    for case in options.cases:
        model_options(case, options.num_layers)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {
        "modes": options.modes,
        "num_layers": options.num_layers,
        "rounds": options.rounds,
        "dtype": dtype,
    }
    record = Record("models", settings, device=device, output=options.output, resume=options.resume)
    for case in options.cases:
        if any(record.find(case=case, mode=mode) is None for mode in options.modes):
            measure(case, device, dtype, options, record)
    record.complete()
    return int(record.has_failed)


def measure(
    case: str, device: torch.device, dtype: str, options: argparse.Namespace, record: Record
) -> None:
    """Measures the modes of one model, in turn."""
    name, _, size = case.partition(":")
    given = model_options(case, options.num_layers)
    modality = model_info(name).modality
    model = create_model(name, **given).to(device)
    loss_of, num_tokens = make_loss(model, modality, int(size or 0), device)
    step = make_step(model, loss_of, dtype)
    ready: dict[str, dict[str, Any]] = {}
    expected = None
    for mode in options.modes:
        if record.find(case=case, mode=mode) is not None:
            continue
        ready[mode] = {"case": case, "model": name, "mode": mode, "tokens": num_tokens}
        if mode == "memory saving":
            ready[mode]["chunk_size"] = chunk_size(num_tokens)
        MODES[mode](model, num_tokens)
        with reason_if_it_fails(ready, mode, model, record):
            found = loss_and_grad_norm(model, loss_of, dtype)
            expected = found if expected is None else expected
            check_agreement(found, expected, dtype)
    # Only now, since a step changes the weights.
    for mode in list(ready):
        MODES[mode](model, num_tokens)
        with reason_if_it_fails(ready, mode, model, record):
            step()
            ready[mode]["peak_extra_mib"] = peak_extra_mib(step)

    def run(mode: str) -> None:
        MODES[mode](model, num_tokens)
        step()

    with make_progress() as progress:
        task = progress.add_task(case, total=options.rounds * len(ready))
        timings = alternate(
            {mode: partial(run, mode) for mode in ready},
            rounds=options.rounds,
            warmup=0,
            on_run=lambda _: progress.advance(task),
        )
    for mode, timing in timings.items():
        ready[mode] |= timing_ms(timing)
        ready[mode]["tokens_per_s"] = num_tokens / timing.median_s
    first = next(iter(ready.values()), None)
    for cell in ready.values():
        cell["ratios"] = {
            "time_over": cell["median_ms"] / first["median_ms"],
            "memory_over": cell["peak_extra_mib"] / first["peak_extra_mib"],
            "over": first["mode"],
        }
        record.add([cell])
        print(line_of(cell), flush=True)


def model_options(case: str, num_layers: int | None) -> dict[str, int]:
    """Options of the model of a case.

    Raises:
        ValueError: If there is no such model, or no training step for it, of this size.
    """
    name, _, size = case.partition(":")
    modality = model_info(name).modality
    if modality not in ("text", "slide", "vision"):
        raise ValueError(f"--cases must be of text, slide or vision, got {case!r} of {modality}.")
    if (size or modality != "vision") and not (size.isdecimal() and int(size) > 0):
        raise ValueError(f"--cases must be MODEL:SIZE with SIZE of at least 1, got {case!r}.")
    given = {"num_layers": num_layers} if num_layers else {}
    # Pixels of a vision model are its image size; other sizes are those of the input.
    if modality == "vision" and size:
        given["img_size"] = int(size)
    replace(find_model(name).config, **given)  # its checks
    return given


def make_loss(model: Any, modality: str, size: int, device: torch.device) -> tuple[Loss, int]:
    """A loss on fixed random input, and its number of tokens."""
    if modality == "text":
        tokens = torch.randint(0, model.config.vocab_size, (1, size + 1), device=device)
        return lambda: model.loss(tokens[:, :-1], tokens[:, 1:]), size
    if modality == "slide":
        tiles, coords = (x.to(device) for x in draw_slide(size))
        return lambda: model(tiles, coords).float().square().mean(), size
    pixels = torch.randn(1, model.in_chans, *model.config.img_size, device=device)
    num_tokens = model.config.usual_seq_len
    return lambda: model(pixels).float().square().mean(), num_tokens


def make_step(model: nn.Module, loss_of: Loss, dtype: str) -> Callable[[], None]:
    """A training step: forward, backward, AdamW."""
    parameters = [x for x in model.parameters() if x.requires_grad]
    is_cuda = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True if is_cuda else None)

    def step() -> None:
        with cast(model, dtype):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def cast(model: nn.Module, dtype: str) -> AbstractContextManager[Any]:
    """Autocast to a half type; nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    device = next(model.parameters()).device
    return torch.autocast(device.type, dtype=DTYPES[dtype][0])


def loss_and_grad_norm(model: nn.Module, loss_of: Loss, dtype: str) -> tuple[float, float]:
    """Loss and norm of the gradient of all weights, without dropout: the same in every mode."""
    model.eval()
    with cast(model, dtype):
        loss = loss_of()
    loss.backward()
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item()
    model.zero_grad(set_to_none=True)
    model.train()
    return loss.item(), norm


def check_agreement(found: tuple[float, float], expected: tuple[float, float], dtype: str) -> None:
    """Refuses a mode whose loss and gradient norm are not those of the first."""
    errors = [abs(a - b) / (abs(b) + 1e-12) for a, b in zip(found, expected, strict=True)]
    if not all(error <= TOLERANCE[dtype] for error in errors):  # of NaNs, too
        raise ArithmeticError(
            f"wrong: loss and gradient norm are {found}, those of the first mode {expected}"
        )


@contextmanager
def reason_if_it_fails(
    ready: dict[str, dict[str, Any]], mode: str, model: nn.Module, record: Record
) -> Iterator[None]:
    """Turns an error into a cell with the reason; the other modes go on."""
    try:
        yield
    except (ArithmeticError, RuntimeError) as error:
        record.add([{**ready.pop(mode), "reason": reason_of(error)}])
        print(line_of(record.cells[-1]), flush=True)
        stop_if_broken(f"{mode} of {record.cells[-1]['case']}", error)
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def line_of(cell: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"{cell['case']:36}{cell['mode']:16}"
    if "reason" in cell:
        return f"{start}{cell['reason']}"
    ratios = cell["ratios"]
    return (
        f"{start}{cell['tokens_per_s']:12,.0f} tokens/s{cell['peak_extra_mib']:10,.0f} MiB   "
        f"time {ratios['time_over']:.2f}, memory {ratios['memory_over']:.2f} of {ratios['over']}"
    )


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=CASES,
        metavar="MODEL[:SIZE]",
        help="SIZE: tokens of a text, tiles of a slide, pixels of the side of an image",
    )
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--num-layers", type=at_least_1, help="another depth than the model's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
