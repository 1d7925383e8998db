"""What `longnet-zoo generate` and `longnet-zoo stream` do."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longnet_zoo.bench import choose_device
from longnet_zoo.command_options import (
    add_dtype_argument,
    add_option_argument,
    read_options,
    weights_source,
)
from longnet_zoo.factory import create_model
from longnet_zoo.models.generation import check_seed
from longnet_zoo.models.text_decoder import LongNetLM
from longnet_zoo.registry import find_model
from longnet_zoo.tokenizers import Tokenizer, load_tokenizer

from .generation import generate_text, printable
from .score import FileScore, score_file

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["add_text_commands"]

_RANDOM = "random"


def add_text_commands(commands: Any) -> None:
    """Adds the commands to those of `longnet-zoo`."""
    command = commands.add_parser(
        "generate",
        help="write on from a text",
        description="Writes on from a text with a causal model, with memory that does not grow.",
    )
    command.add_argument("prompt", help="the text to write on from; '' begins a document")
    _add_model_options(command)
    command.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    command.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)"
    )
    command.add_argument("--top-k", type=int, help="draw among so many of the likeliest tokens")
    command.add_argument("--top-p", type=float, help="draw among the likeliest with this share")
    command.add_argument("--min-p", type=float, help="least share of the likeliest one's")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="default: 1, none")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends it; repeatable"
    )
    command.add_argument("--seed", type=int, help="the same number gives the same text")
    command.set_defaults(run=_generate)

    command = commands.add_parser(
        "stream",
        help="score a file of any size in constant memory",
        description="Reads a file of any size with a causal model, chunk by chunk, and prints how "
        "many bits it needs for a byte: exactly as in one pass, in constant memory.",
    )
    command.add_argument("--file", type=Path, required=True, help="the file to read")
    _add_model_options(command)
    command.add_argument(
        "--chunk-size", type=int, help="tokens read at once (default: the longest segment)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_stream)


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="longnet_lm_tiny", help="default: longnet_lm_tiny")
    command.add_argument(
        "--pretrained",
        type=weights_source,
        metavar="SOURCE",
        help="its weights: a tag, a file, a folder, a recipe's checkpoint, hf_hub:owner/name, or "
        f"{_RANDOM} (default: those that come with the package, if there are any for the model)",
    )
    command.add_argument(
        "--tokenizer", default="bytes", help="bytes, or the path of a tokenizer.json"
    )
    add_option_argument(
        command, words="an option of the model, such as segment_lengths=2048,65536 (of one: 2048,)"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_dtype_argument(command)


def _generate(options: argparse.Namespace) -> None:
    if options.seed is not None:
        check_seed(options.seed)
        torch.manual_seed(options.seed)  # also of weights that are drawn
    model, tokenizer = _model(options)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    waiting = [options.prompt]

    def show(text: str) -> None:
        sys.stdout.write(printable("".join([*waiting, text])))
        sys.stdout.flush()
        waiting.clear()

    generate_text(
        model,
        tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop_strings=options.stop,
        seed=options.seed,
        on_text=show,
    )
    show("\n")


def _stream(options: argparse.Namespace) -> None:
    file_bytes = options.file.stat().st_size
    model, tokenizer = _model(options)
    start = time.perf_counter()
    with _progress() as progress:
        bar = progress.add_task("", total=file_bytes, facts="")

        def show(score: FileScore) -> None:
            speed = score.num_tokens / (time.perf_counter() - start)
            facts = f"{score.bits_per_byte:.3f} bits/byte  {speed:,.0f} tokens/s"
            progress.update(bar, completed=score.num_bytes, facts=facts)

        score = score_file(
            model, options.file, tokenizer, chunk_size=options.chunk_size, on_progress=show
        )
    seconds = time.perf_counter() - start
    if options.json:
        found = {
            "model": options.model,
            "pretrained": _source(options),
            "options": read_options(options.option, function=create_model),
            "dtype": options.dtype,
            "tokenizer": options.tokenizer,
            "file": str(options.file),
            "num_bytes": score.num_bytes,
            "num_tokens": score.num_tokens,
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "seconds": seconds,
        }
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    sys.stdout.write(
        f"{options.file}: {score.bits_per_byte:.4f} bits per byte over {score.num_bytes:,} bytes "
        f"({score.num_tokens:,} tokens, perplexity {score.perplexity:.3f}) in {seconds:.1f} s\n"
    )


def _model(options: argparse.Namespace) -> tuple[LongNetLM, Tokenizer]:
    tokenizer = load_tokenizer(options.tokenizer)
    given = read_options(options.option, function=create_model)
    source = _source(options)
    model = create_model(options.model, pretrained=False if source == _RANDOM else source, **given)
    if not isinstance(model, LongNetLM):
        raise ValueError(
            f"--model must be a causal model of text, such as longnet_lm_tiny, got "
            f"{options.model!r}. `longnet-zoo list '*_lm_*'` shows them."
        )
    if source == _RANDOM and options.pretrained is None:
        sys.stderr.write(
            f"note: the weights of {options.model} are drawn at random; pass --pretrained.\n"
        )
    device = choose_device(options.device)
    return model.to(device, getattr(torch, options.dtype)).eval(), tokenizer


def _source(options: argparse.Namespace) -> str:
    """Whose weights: by default those that come with the package, "random" where none do."""
    if options.pretrained is not None:
        return options.pretrained
    tags = (own.tag for own in find_model(options.model).weights if own.is_shipped)
    return next(tags, _RANDOM)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
