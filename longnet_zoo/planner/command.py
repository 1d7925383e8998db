"""What `longnet-zoo plan` does: options, a table or JSON, and a picture against the length."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from longnet_zoo.bench import Panel, check_matplotlib, draw, save_picture
from longnet_zoo.command_options import add_option_argument, read_options
from longnet_zoo.factory import create_model
from longnet_zoo.layers import MemorySaving
from longnet_zoo.parallel.layout import Layout

from .hardware import GPUS
from .plan import MAX_SEQ_LEN, MethodPlan, Plan, PlanConfig, Precision, plan_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["add_plan_command", "draw_plans", "run_plan"]

_GIB = 2**30
# Lengths of the picture: that of the plan, and shorter ones, each a quarter of the next.
_NUM_LENGTHS = 6


def add_plan_command(commands: Any) -> None:
    """Adds the command to those of `longnet-zoo`."""
    command = commands.add_parser(
        "plan",
        help="predict what training on a long sequence costs",
        description="Predicts memory, bytes sent, FLOPs and time of one training step of a "
        "sequence that GPUs share, for each method, and the longest sequence that fits.",
    )
    command.add_argument("--model", required=True, help="name of the model")
    command.add_argument("--seq-len", type=_count, required=True, help="tokens: 65536 or 1e9")
    command.add_argument("--gpus", type=_count, default=1, help="processes in all (default: 1)")
    command.add_argument(
        "--gpu", type=str.lower, default="h200", help=f"{', '.join(GPUS)} (default: h200)"
    )
    add_option_argument(
        command, words="an option of the model, such as segment_lengths=2048,65536,1e9"
    )
    command.add_argument(
        "--data-parallel-size", type=_count, default=1, help="sequences at a time (default: 1)"
    )
    command.add_argument(
        "--precision", choices=get_args(Precision), default="bf16-mixed", help="default: bf16-mixed"
    )
    command.add_argument(
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether parameters and optimizer are sharded over all GPUs",
    )
    command.add_argument(
        "--layout", choices=get_args(Layout), default="zigzag", help="of ring (default: zigzag)"
    )
    _add_saving_options(command)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--output", type=Path, help="draw OUTPUT.svg and OUTPUT.png against the length as well"
    )
    command.set_defaults(run=_run)


def run_plan(config: PlanConfig, *, as_json: bool = False, output: Path | None = None) -> Plan:
    """Prints a plan; draws it against the length if asked.

    Args:
        config: What to plan.
        as_json: Whether to print JSON instead of a table.
        output: Path of the pictures, without a suffix.

    Raises:
        ValueError: If a value is bad, or `output` has a suffix.
        TypeError: If an option of the model is unknown.
        RuntimeError: If a picture is asked for without matplotlib.
    """
    if output is not None:
        if output.suffix or not output.name:
            raise ValueError(
                f"--output names two files, so it must have a name and no suffix, got {output}."
            )
        check_matplotlib()
    plan = plan_step(config)
    if as_json:
        sys.stdout.write(json.dumps(asdict(plan), indent=2) + "\n")
    else:
        _print(plan)
    if output is not None:
        lengths = [config.seq_len // 4**step for step in reversed(range(_NUM_LENGTHS))]
        plans = [
            plan_step(replace(config, seq_len=n), longest=False)
            for n in lengths
            if n >= config.gpus
        ]
        paths = save_picture(draw_plans(plans), output)
        if not as_json:
            sys.stdout.writelines(f"wrote {path}\n" for path in paths)
    return plan


def draw_plans(plans: Sequence[Plan]) -> Figure:
    """Draws memory, bytes and time of plans that differ in their length only.

    Raises:
        RuntimeError: If matplotlib is not installed.
    """
    config = plans[-1].config
    values = {
        "GiB on a rank": lambda x: x.memory.total / _GIB,
        "MiB sent by a rank in a layer, forward + backward": lambda x: (
            (x.forward_bytes + x.backward_bytes) / 2**20
        ),
        "seconds of a step": lambda x: x.time.step_s,
    }
    panels = []
    for title, value in values.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for plan in plans:
            for method in plan.methods:
                # A logarithmic axis has no zero: nothing is sent.
                if not method.refusal and value(method) > 0:
                    point = (float(plan.config.seq_len), value(method))
                    lines.setdefault(_name(method), []).append(point)
        panels.append(Panel(title=title, lines=lines, x_label="tokens"))
    facts = f"{config.gpus} x {config.gpu}, {_sequences(config)} at a time"
    if config.memory_saving is not None and config.memory_saving.offload:
        facts += ", offload"
    return draw(
        [panel for panel in panels if panel.lines],
        title=f"{config.model}: predicted, not measured",
        facts=f"{facts}, {config.precision}, {plans[-1].usable_bytes / _GIB:.0f} GiB usable",
    )


def _add_saving_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory-saving",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether blocks are computed again in the backward pass",
    )
    chunk = MemorySaving().chunk_size
    command.add_argument(
        "--chunk-size",
        type=_chunk,
        default=None,
        help=f"tokens whose hidden channels exist at once, 0: all (default: {chunk})",
    )
    for name, words in (
        ("keep-attention", "keep what attention returns"),
        ("offload", "keep what waits for the backward pass in the memory of the CPU"),
    ):
        command.add_argument(f"--{name}", action="store_true", help=words)


def _run(options: argparse.Namespace) -> None:
    config = PlanConfig(
        model=options.model,
        options=read_options(options.option, function=create_model),
        seq_len=options.seq_len,
        gpus=options.gpus,
        gpu=options.gpu,
        data_parallel_size=options.data_parallel_size,
        precision=options.precision,
        fsdp=options.fsdp,
        memory_saving=_saving(options),
        layout=options.layout,
    )
    run_plan(config, as_json=options.json, output=options.output)


def _saving(options: argparse.Namespace) -> MemorySaving | None:
    given = {
        "--chunk-size": options.chunk_size is not None,
        "--keep-attention": options.keep_attention,
        "--offload": options.offload,
    }
    if not options.memory_saving:
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"{names} need --memory-saving, got --no-memory-saving.")
        return None
    chunk = MemorySaving().chunk_size if options.chunk_size is None else options.chunk_size or None
    return MemorySaving(
        chunk_size=chunk, keep_attention=options.keep_attention, offload=options.offload
    )


def _count(text: str) -> int:
    """Reads a positive integer, also as 1e9."""
    return _integer(text, least=1)


def _chunk(text: str) -> int:
    """Reads an integer of at least 0, also as 1e3."""
    return _integer(text, least=0)


def _integer(text: str, *, least: int) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number >= least and number.is_integer() and number <= MAX_SEQ_LEN):
        raise argparse.ArgumentTypeError(
            f"must be an integer from {least} to {MAX_SEQ_LEN:,}, got {text!r}"
        )
    return int(number)


def _print(plan: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    config = plan.config
    saving = config.memory_saving
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{config.model}: one training step, predicted, not measured",
        title_justify="left",
        caption=f"{config.seq_len:,} tokens, {_shared(plan)}, {_sequences(config)} at a time; "
        f"{config.gpus} x {config.gpu}, {config.precision}, "
        f"{'FSDP2' if config.fsdp else 'no sharding'}, "
        f"{'no memory saving' if saving is None else saving}; "
        f"{plan.num_params:,} parameters; {plan.usable_bytes / _GIB:.1f} GiB usable on a GPU",
        caption_justify="left",
    )
    table.add_column("on the busiest rank", no_wrap=True)
    for method in plan.methods:
        table.add_column(method.method, justify="right")
    rows = [_rows(method) for method in plan.methods]
    for name in next((x for x in rows if x), {}):
        table.add_row(name, *(x.get(name, "-") for x in rows))
    console = Console()
    console.print(table)
    for method in plan.methods:
        remark = f"cannot serve: {method.refusal}" if method.refusal else method.note
        if remark:
            console.print(f"{method.method}: {remark}", highlight=False, markup=False)


def _rows(plan: MethodPlan) -> dict[str, str]:
    """Rows of the table; none for a method that cannot serve."""
    memory, time = plan.memory, plan.time
    if memory is None or time is None:
        return {}
    assert plan.forward_bytes is not None
    assert plan.backward_bytes is not None
    assert plan.parameter_bytes is not None
    assert plan.flops is not None
    sharded = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "AdamW": memory.optimizer,
        "gathered blocks": memory.gathered,
        "activations": memory.activations,
    }
    waiting = {"waits in CPU memory": _bytes(memory.offloaded)} if memory.offloaded else {}
    return {
        **{name: _bytes(size) for name, size in sharded.items()},
        "memory": f"{_bytes(memory.total)}{'' if plan.fits else ' (too much)'}",
        **waiting,
        "sent in a layer, forward": _bytes(plan.forward_bytes),
        "sent in a layer, backward": _bytes(plan.backward_bytes),
        "sent for parameters": _bytes(plan.parameter_bytes),
        "FLOPs": f"{plan.flops:.3g}",
        "computation": _seconds(time.compute_s),
        "hidden communication": _seconds(time.hidden_s),
        "exposed communication": _seconds(time.exposed_s),
        "step": _seconds(time.step_s),
        "longest sequence": f"{_rounded(plan.longest_seq_len or 0):,}",
    }


def _name(plan: MethodPlan) -> str:
    return f"{plan.method} (dense)" if plan.note else plan.method


def _shared(plan: Plan) -> str:
    ranks = plan.config.sequence_parallel_size
    return "on one rank" if ranks == 1 else f"{plan.rows_per_rank:,} on each of {ranks} ranks"


def _sequences(config: PlanConfig) -> str:
    size = config.data_parallel_size
    return f"{size} sequence{'' if size == 1 else 's'}"


def _bytes(size: float) -> str:
    """Three digits with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB" if size < 1000 else f"{size:,.0f} TiB"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _rounded(number: int) -> int:
    """Two leading digits, rounded down."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit
