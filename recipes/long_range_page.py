"""The page of a sweep: what was compared, on what, and what came out, as Markdown."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longnet_zoo.bench import markdown_table
from longnet_zoo.long_range import TASKS, Cell
from longnet_zoo.long_range.table import COLUMNS, rows

__all__ = ["long_range_page"]

_PAGE = """# Long-range tasks

Dilated against dense attention at the same training FLOPs and else alike, so the cheaper step buys
more steps. Models are tested at the length that they were trained at. Runs of each: {num_seeds},
with seeds of weights and examples of their own. The rules of the tasks are in
`longnet_zoo/long_range`, all settings in `configs/long_range`.

![accuracy over length]({picture})

{tables}
Accuracy is in percent. Spread is the worst and the best of several runs, of a single one the 95 %
interval of its examples. FLOPs are those of one example, forward; training those of a run, with the
backward pass. "Constant" always gives the answer that is the most frequent in training examples.

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
        picture=Path(os.path.relpath(picture, page.parent)).as_posix(),
        tables="\n".join(tables),
        command=document["command"],
        **{name: ", ".join(map(str, values)) for name, values in document["environment"].items()},
    )


def _words(model: Mapping[str, Any]) -> str:
    """Returns what a task asks, and of which model."""
    about = inspect.getdoc(inspect.getmodule(TASKS[model["task"]])).splitlines()[0]
    options = {**(model.get("task_options") or {}), **(model.get("model_options") or {})}
    begins = "with its trained weights" if model.get("pretrained") else "untrained"
    lengths, rates = (
        ", ".join(f"{number:,}" for number in model[name] or ()) or "those of the model"
        for name in ("segment_lengths", "dilation_rates")
    )
    others = "".join(f", `{name}={value}`" for name, value in options.items())
    start = f"`{model['model_name']}` begins {begins}"
    return f"{about}\n\n{start}; segments {lengths}, rates {rates}{others}."
