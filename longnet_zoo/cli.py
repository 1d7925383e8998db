"""The command `longnet-zoo`: models, text, patterns, speed, plans and data.

rich and matplotlib are imported inside the functions that need them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from longnet_zoo.bench import ComparisonConfig, run_bench
from longnet_zoo.export import add_export_command
from longnet_zoo.factory import ModelInfo, list_models, model_info
from longnet_zoo.long_range.command import add_evaluate_command
from longnet_zoo.open_data import add_data_command
from longnet_zoo.ops.kernels import BACKENDS
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.planner import add_plan_command
from longnet_zoo.plot import DOTS_PER_INCH, plot_pattern
from longnet_zoo.registry import PublishedWeights, find_model, nearest_names
from longnet_zoo.text.command import add_text_commands

__all__ = ["main", "short_number"]

_PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
_HEADS_DRAWN = 8
# What a wrong argument raises: shown as one line. Anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, SafetensorError)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Arguments; None takes those of the process.

    Returns:
        The exit code, 0. Wrong arguments raise SystemExit with code 2 after one line on stderr,
        Ctrl-C with code 130, and a reader that leaves (`| head`) with code 1.
    """
    parser = _make_parser()
    options = parser.parse_args(args)
    try:
        options.run(options)
        sys.stdout.flush()
    except MemoryError as error:
        parser.exit(2, f"{parser.prog}: error: out of memory. {error}\n")
    except BrokenPipeError:
        # Whoever read has what they wanted; what is left to write must not fail on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    except _USER_ERRORS as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is one `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="longnet-zoo", description="Models with exact dilated attention.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="list the models", description="Lists the models.")
    command.add_argument("pattern", nargs="?", default="*", help="pattern on the name: '*_lm_*'")
    command.add_argument("--modality", help="only this modality, such as text")
    command.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="only models with published weights, or only those without",
    )
    command.set_defaults(run=_list)

    command = commands.add_parser("info", help="describe a model", description="Describes a model.")
    command.add_argument("name", help="name of the model")
    command.add_argument(
        "--seq-len",
        type=int,
        help="tokens to count FLOPs for (default: its usual length)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_info)

    add_text_commands(commands)
    add_evaluate_command(commands)
    add_export_command(commands)
    _add_plot_command(commands)
    _add_bench_command(commands)
    add_plan_command(commands)
    add_data_command(commands)
    return parser


def _add_plot_command(commands: Any) -> None:
    command = commands.add_parser(
        "plot-pattern",
        help="draw who attends to whom",
        description="Draws which query attends to which key, one panel per head.",
    )
    command.add_argument("--model", help="take pattern, heads and causality from this model")
    command.add_argument(
        "--segment-lengths", type=int, nargs="+", metavar="TOKENS", help="one per branch"
    )
    command.add_argument(
        "--dilation-rates", type=int, nargs="+", metavar="RATE", help="one per branch"
    )
    command.add_argument(
        "--head-offset", choices=("modulo", "block"), help="where heads start (default: modulo)"
    )
    command.add_argument("--seq-len", type=int, help="tokens (default: the longest segment)")
    command.add_argument("--num-heads", type=int, help="heads of the attention (default: 4)")
    command.add_argument(
        "--heads", type=int, nargs="+", help=f"heads to draw (default: the first {_HEADS_DRAWN})"
    )
    command.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a query sees only keys up to itself",
    )
    command.add_argument("--title", help="title of the picture")
    command.add_argument("--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    command.set_defaults(run=_plot_pattern)


def _add_bench_command(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="time dilated against vanilla attention",
        description="Times dilated against vanilla attention over sequence lengths, at a fixed "
        "number of tokens: milliseconds of one sequence, forward, projections included.",
    )
    command.add_argument(
        "--is-dilated",
        "--is_dilated",
        type=int,
        choices=(0, 1),
        default=argparse.SUPPRESS,
        help="time only dilated (1) or only vanilla (0) attention, not both in turn",
    )
    for name, value, metavar, words in (
        ("max_seq_len", int, "TOKENS", "longest sequence, and tokens of every batch"),
        ("num_seq_lens", int, "NUMBER", "lengths, each twice the one before"),
        ("num_iter", int, "NUMBER", "timed calls of each"),
        ("num_heads", int, "NUMBER", "attention heads"),
        ("emb_dim", int, "CHANNELS", "channels of the input"),
        ("device", str, "DEVICE", "auto, cpu, cuda or cuda:N"),
        ("backend", str, "NAME", f"kernel of dilated attention: {', '.join(BACKENDS)}"),
        ("dtype", str, "DTYPE", "float32, bfloat16 or float16"),
    ):
        names = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        default = getattr(ComparisonConfig, name)
        words = f"{words} (default: {default})"
        command.add_argument(*names, type=value, metavar=metavar, default=default, help=words)
    for name, metavar in (("segment_lengths", "TOKENS"), ("dilation_rates", "RATE")):
        default = getattr(ComparisonConfig, name)
        command.add_argument(
            f"--{name.replace('_', '-')}",
            f"--{name}",
            type=int,
            nargs="+",
            metavar=metavar,
            default=default,
            help=f"one per branch (default: {' '.join(map(str, default))})",
        )
    command.add_argument(
        "--output",
        type=Path,
        help="write OUTPUT.json (after every length), OUTPUT.svg and OUTPUT.png",
    )
    command.add_argument(
        "--resume", action="store_true", help="keep the lengths in OUTPUT.json, run the others"
    )
    command.add_argument(
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to draw; --no-picture writes JSON only",
    )
    command.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    given = dict(vars(options))
    run = {name: given.pop(name) for name in ("output", "picture", "resume")}
    del given["run"]
    for name in ("segment_lengths", "dilation_rates"):
        given[name] = tuple(given[name])
    if "is_dilated" in given:
        given["is_dilated"] = bool(given["is_dilated"])
    run_bench(ComparisonConfig(**given), **run)


def _list(options: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = list_models(options.pattern, modality=options.modality, pretrained=options.pretrained)
    if not names:
        filters = {"--modality": options.modality, "--pretrained": options.pretrained}
        given = "".join(f", {name} {x}" for name, x in filters.items() if x is not None)
        near = "" if given else nearest_names(options.pattern.strip("*"), list_models())
        cure = f"Did you mean {near}?" if near else "`longnet-zoo list` shows all."
        raise ValueError(f"no model matches {options.pattern!r}{given}. {cure}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True, style="bold")
    table.add_column("modality", no_wrap=True)
    table.add_column("size", no_wrap=True, justify="right")
    table.add_column("weights", no_wrap=True)
    table.add_column("what")
    for info in map(model_info, names):
        table.add_row(
            info.name,
            info.modality.replace("-", "-\n"),  # two short lines leave room for the last column
            short_number(info.num_params),
            "yes" if info.weights else "",
            info.description,
        )
    Console().print(table)


def _info(options: argparse.Namespace) -> None:
    info = model_info(options.name, options.seq_len)
    if options.json:
        sys.stdout.write(json.dumps(asdict(info), indent=2) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    facts = Table(box=None, show_header=False, title=info.name, title_justify="left")
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.columns[1].overflow = "fold"  # addresses have no spaces
    for name, value in [*_facts(info).items(), *map(_weights_fact, info.weights)]:
        facts.add_row(name, value)
    config = Table("option", "default", box=box.SIMPLE_HEAD)
    for name, value in _options(info.config):
        config.add_row(name, " ".join(map(str, value)) if isinstance(value, tuple) else str(value))
    console = Console()
    console.print(facts)
    console.print(config)


def _options(config: Any) -> Iterator[tuple[str, Any]]:
    """Names every option with its value, those of the configs in a tuple one by one."""
    for name, value in config.options().items():
        if isinstance(value, tuple) and value and hasattr(value[0], "options"):
            for number, part in enumerate(value):
                yield from ((f"{name}[{number}].{own}", x) for own, x in _options(part))
        else:
            yield name, value


def _plot_pattern(options: argparse.Namespace) -> None:
    if options.output.suffix not in _PICTURE_SUFFIXES:
        raise ValueError(
            f"--output must end in one of {', '.join(_PICTURE_SUFFIXES)}, got {options.output}."
        )
    pattern, num_heads, is_causal = _chosen_pattern(options)
    seq_len = pattern.segment_lengths[-1] if options.seq_len is None else options.seq_len
    heads = options.heads or range(min(num_heads, _HEADS_DRAWN))
    title = options.title or (
        f"{options.model}: who attends to whom"
        if options.model
        else "Dilated attention: who attends to whom"
    )
    figure = plot_pattern(
        pattern,
        seq_len=seq_len,
        num_heads=num_heads,
        is_causal=is_causal,
        heads=heads,
        title=title,
    )
    figure.savefig(options.output, dpi=DOTS_PER_INCH)
    sys.stdout.write(f"wrote {options.output}\n")


def _chosen_pattern(options: argparse.Namespace) -> tuple[DilatedPattern, int, bool]:
    """Pattern, number of heads and causality, of a model or from the options."""
    if options.model is not None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("segment_lengths", "dilation_rates", "head_offset")
            if getattr(options, name) is not None
        ]
        if given:
            raise ValueError(f"--model brings its own pattern, got also {', '.join(given)}.")
        config = find_model(options.model).config
        pattern, num_heads, is_causal = config.pattern, config.num_heads, config.is_causal
    else:
        if options.segment_lengths is None or options.dilation_rates is None:
            raise ValueError("give --segment-lengths and --dilation-rates, or --model.")
        pattern = DilatedPattern(
            segment_lengths=tuple(options.segment_lengths),
            dilation_rates=tuple(options.dilation_rates),
            head_offset=options.head_offset or "modulo",
        )
        num_heads, is_causal = 4, False
    return (
        pattern,
        num_heads if options.num_heads is None else options.num_heads,
        is_causal if options.causal is None else options.causal,
    )


def _facts(info: ModelInfo) -> dict[str, str]:
    return {
        "what": info.description,
        "family": info.family,
        "modality": info.modality,
        "source": info.source,
        "weights": "; ".join(x.tag for x in info.weights) or "none published",
        **_published_facts(info.published_options),
        **_pattern_facts(info.pattern),
        "parameters": f"{info.num_params:,} ({short_number(info.num_params)})",
        "forward FLOPs": f"{short_number(info.flops)} for {info.seq_len:,} tokens",
    }


def _published_facts(options: Mapping[str, Any]) -> dict[str, str]:
    if not options:
        return {}
    return {"published names bring": "\n".join(f"{key}={x!r}" for key, x in options.items())}


def _pattern_facts(pattern: DilatedPattern) -> dict[str, str]:
    if pattern.is_dense:
        return {"attention": "dense; set segment_lengths and dilation_rates for a dilated one"}
    return {
        "segment lengths": " ".join(map(str, pattern.segment_lengths)),
        "dilation rates": " ".join(map(str, pattern.dilation_rates)),
    }


def _weights_fact(weights: PublishedWeights) -> tuple[str, str]:
    """What to know before loading them: where, under which licence, how checked."""
    lines = [
        weights.location,
        f"licence: {weights.licence}",
        f"SHA-256: {weights.sha256 or 'none stated by the publisher'}",
        f"note: {weights.note}" if weights.note else "",
        f"options: {dict(weights.options)}" if weights.options else "",
    ]
    return f"- {weights.tag}", "\n".join(filter(None, lines))


def short_number(number: int) -> str:
    """Three digits with a unit: 831K, 162M, 2.78G, 10.1T."""
    units = ("", "K", "M", "G", "T", "P", "E")
    # By what is shown: 999,600 is 1M, not 1000K.
    power = min(max(0, len(f"{float(f'{number:.3g}'):.0f}") - 1) // 3, len(units) - 1)
    return f"{number / 1000**power:.3g}{units[power]}"


def _version() -> str:
    return f"longnet-zoo {sys.modules['longnet_zoo'].__version__}"


if __name__ == "__main__":
    sys.exit(main())
