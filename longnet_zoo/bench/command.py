"""What `longnet-zoo bench` does: progress, lines, JSON and pictures around `compare`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import ComparisonConfig, Lengths, compare, describe, header, panels
from .measure import choose_device, make_progress
from .picture import check_matplotlib, draw, save_picture
from .record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_bench", "run_bench"]


def run_bench(
    config: ComparisonConfig,
    *,
    output: Path | None = None,
    picture: bool = True,
    resume: bool = False,
) -> list[Lengths]:
    """Prints the times length by length; writes OUTPUT.json, OUTPUT.svg and OUTPUT.png if asked.

    Args:
        config: What to compare.
        output: Path of the files, without a suffix. JSON is written after every length.
        picture: Whether to draw; JSON is written anyway.
        resume: Whether to keep the lengths that OUTPUT.json holds.

    Raises:
        ValueError: If `output` has no name, a suffix, or cannot be written, memory does not
            suffice, or there is nothing that can be resumed.
        RuntimeError: If the device is not there, a result is wrong, or a picture is asked for
            without matplotlib.
        NotImplementedError: If the named backend cannot serve the call, with the reason.
    """
    if output is None and resume:
        raise ValueError("--resume needs --output OUTPUT, got none.")
    if output is not None:
        if output.suffix or not output.name:
            raise ValueError(
                "--output names three files, so it must have a name and it must have no suffix, "
                f"got {output}."
            )
        if picture:
            check_matplotlib()
    record = Record(
        "bench",
        asdict(config),
        command=_command(config, output),
        device=choose_device(config.device),
        output=output.with_suffix(".json") if output else None,
        resume=resume,
    )
    results = _measure(config, record)
    record.complete()
    if output is not None and record.output is not None:
        pictures = save_picture(draw_bench(record.document), output) if picture else ()
        sys.stdout.writelines(f"wrote {path}\n" for path in (record.output, *pictures))
    return results


def _measure(config: ComparisonConfig, record: Record) -> list[Lengths]:
    """Prints every length, and times and records those that have no cell yet."""
    results = [Lengths(**cell) for cell in record.cells]
    missing = config.num_seq_lens - len(results)
    for result in results:
        _show(result, config, is_first=result is results[0])
    with make_progress() as progress:
        task = progress.add_task(
            "checking", total=len(config.kinds) * missing * (config.num_iter + 1)
        )

        def show(kind: str) -> None:
            progress.update(task, advance=1, description=kind)

        skipped = [result.seq_len for result in results]
        for result in compare(config, on_run=show, skipped=skipped) if missing else ():
            _show(result, config, is_first=not results)
            results.append(result)
            record.add([asdict(result)])
    return results


def _show(result: Lengths, config: ComparisonConfig, *, is_first: bool) -> None:
    sys.stdout.write((header(config) if is_first else "") + describe(result) + "\n")
    sys.stdout.flush()


def _command(config: ComparisonConfig, output: Path | None) -> str:
    """The command line that does the same, without folders of this machine."""
    words = ["longnet-zoo", "bench"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            option = f"--{field.name.replace('_', '-')}"
            words += [option, *(str(int(x)) if isinstance(x, bool) else str(x) for x in values)]
    return shlex.join([*words, *(("--output", output.name) if output else ())])


def draw_bench(document: dict[str, Any]) -> Figure:
    """Draws what `run_bench` has written."""
    settings, machine = document["settings"], document["environment"]
    facts = f"{settings['max_seq_len']:,} tokens a batch, {settings['num_heads']} heads"
    return draw(
        panels([Lengths(**cell) for cell in document["cells"]]),
        title="dilated against vanilla attention, causal, forward",
        facts=f"{facts}, {settings['dtype']}, {machine['device']}, PyTorch {machine['torch']}",
    )
