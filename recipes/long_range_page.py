"""The page of a sweep: what was compared, on what, and what came out, as Markdown."""

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longnet_zoo import model_info
from longnet_zoo.bench import markdown_table
from longnet_zoo.long_range import TASKS, Cell
from longnet_zoo.long_range.table import COLUMNS, rows

__all__ = ["long_range_page"]

_PAGE = """# Long-range tasks

Dilated and dense attention with the same training FLOPs and all else alike: where a step is
cheaper, there are more of them. Models are tested at the length that they were trained at. Runs of
each: {num_seeds}, with seeds of weights and examples of their own. The rules of the tasks are in
`longnet_zoo/long_range`, all settings in `configs/long_range`.

![accuracy over length]({picture})

The better mean has, {ahead}.

{tables}
Accuracy is in percent. "Chance" is a guess among the answers that an example leaves open, and
"constant" always gives the answer that is the most frequent in training examples. Spread is each of
several runs, of a single one the 95 % interval of its examples. FLOPs are those of one example,
forward; training those of a run, with the backward pass.

Measured by `{command}` on {device}, one thread a run, PyTorch {torch}, code at {commit}, {date}.
"""


def long_range_page(document: dict[str, Any], *, picture: Path, page: Path) -> str:
    """Returns the page.

    Args:
        document: What the sweep writes as JSON.
        picture: Where the picture is.
        page: Where the page will be, which links to the picture.
    """
    tables = [
        f"## {task}\n\n{_words(document['settings'][task])}\n\n"
        f"{markdown_table(COLUMNS, rows([Cell(**cell) for cell in cells]))}\n"
        for task, cells in document["tasks"].items()
    ]
    return _PAGE.format(
        num_seeds=document["seeds"],
        ahead=_ahead(document["tasks"]),
        picture=Path(os.path.relpath(picture, page.parent)).as_posix(),
        tables="\n".join(tables),
        command=document["command"],
        **{name: ", ".join(map(str, values)) for name, values in document["environment"].items()},
    )


def _ahead(tasks: Mapping[str, list[dict[str, Any]]]) -> str:
    """Says by length which attention has the better mean in which tasks."""
    best: dict[int, dict[str, list[str]]] = {}
    for task, documents in tasks.items():
        cells = [Cell(**cell) for cell in documents if cell["accuracies"]]
        for seq_len in sorted({cell.seq_len for cell in cells}):
            first = max((cell for cell in cells if cell.seq_len == seq_len), key=lambda x: x.mean)
            best.setdefault(seq_len, {}).setdefault(first.label, []).append(task)
    led = {
        seq_len: " and ".join(f"{label} in {', '.join(names)}" for label, names in labels.items())
        for seq_len, labels in sorted(best.items())
    }
    return "; ".join(f"at {seq_len:,} tokens, {words}" for seq_len, words in led.items())


def _words(model: Mapping[str, Any]) -> str:
    """Returns what a task asks, and of which model."""
    about = inspect.getdoc(inspect.getmodule(TASKS[model["task"]])).splitlines()[0]
    options = {**(model.get("task_options") or {}), **(model.get("model_options") or {})}
    own = model_info(model["model_name"]).pattern
    own_branches = _branches(own.segment_lengths, own.dilation_rates)
    begins = "untrained"
    if weights := model.get("pretrained"):
        known = f"its weights, trained with {own_branches}" if weights is True else f"`{weights}`"
        begins = f"with {known}"
    pattern = _branches(model["segment_lengths"] or (), model["dilation_rates"] or ())
    others = "".join(f", `{name}={value}`" for name, value in options.items())
    start = f"`{model['model_name']}` begins {begins}"
    return f"{about}\n\n{start}; segments (length : rate) {pattern or own_branches}{others}."


def _branches(segment_lengths: Iterable[int], dilation_rates: Iterable[int]) -> str:
    pairs = zip(segment_lengths, dilation_rates, strict=True)
    return ", ".join(f"{length:,} : {rate}" for length, rate in pairs)
