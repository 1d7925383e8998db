"""Writes the card of weights that come with the package from what was measured of them.

python -m benchmarks.model_card
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import Parser
from benchmarks.pretrained import XZ
from benchmarks.tables import TABLES, Document, figures, table
from longnet_zoo.bench import reading
from longnet_zoo.factory import model_info

__all__ = ["card"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCORES, RUN, DENSE_RUN = (
    RESULTS / f"{name}.json"
    for name in ("pretrained-cpu", "pretraining-dilated", "pretraining-dense")
)
CARD = ROOT / "longnet_zoo" / "weights" / "shipped" / "longnet_lm_tiny" / "README.md"
SHIPPED, DENSE = "shipped", "dense"

# What the corpus reads, with the licence of each.
LICENCES = {
    "stdlib": "PSF-2.0",
    "torch": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "lightning": "Apache-2.0",
}

_HEAD = """---
library_name: longnet_zoo
pipeline_tag: text-generation
license: apache-2.0
tags: [longnet, dilated-attention, code, python, byte-level]
---

# longnet_lm_tiny, weights `pystdlib`

A causal language model of bytes, {params:,} parameters, that has read Python code. It comes with
the package, so it needs no network:

    import longnet_zoo as lz
    model = lz.create_model("longnet_lm_tiny", pretrained=True).eval()

    longnet-zoo generate "def "
    longnet-zoo stream --file FILE

It is small, and made to show how long context is used and to try things on: it writes what looks
like Python, but not programmes that work. Nothing was done against bias or against secrets in the
files; it has seen none but those below.

## Architecture

{layers} layers of {embed_dim} channels, {heads} heads, xPos, sub-LayerNorm; segments
{lengths}, dilation rates {rates}: what a token sees
grows to {reach:,} bytes. Weights are bfloat16 on disk.
"""

_DATA = """
## Data

Python files (`source: python`): the standard library of Python {python} and the installed packages
below, without what is installed beside them; files with the same content once. A file is held out
by a hash of its path: {val:.1f} MB for validation while training, {test:.1f} MB for the test, which
no choice was made by. Fingerprint of files and splits: `{fingerprint}`.
"""

_TRAINING = """
## Training

    python -m recipes.text_lm fit --config configs/text/pretrain_pystdlib.yaml

{steps:,} steps, {tokens:.1f} million bytes (the files have {available:.0f}), {flops:.2e} FLOPs,
{hours:.1f} hours on {cores} cores ({device}) with other work beside it; precision {precision},
{optimizer}, learning rate {lr:g}. The context grew from {start:,} to {seq_len:,} bytes. Then

    longnet-zoo export longnet_lm_tiny --pretrained runs/pretrain_pystdlib/checkpoints/last.ckpt \\
        --dtype bfloat16 --output longnet_zoo/weights/shipped/longnet_lm_tiny
"""

_FIGURES = """
## Bits per byte of the held-out files

    {command}

{words}
"""


def main() -> None:
    """Writes the card."""
    parser = Parser(__doc__)
    parser.parse_args()
    try:
        files = [file for file in (SCORES, RUN, DENSE_RUN) if file != DENSE_RUN or file.exists()]
        with reading(RESULTS):
            text = card(*(json.loads(file.read_text(encoding="utf-8")) for file in files))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    CARD.write_text(text, encoding="utf-8")
    print(f"wrote {CARD.relative_to(ROOT)}")


def card(document: Document, run: Document, dense_run: Document | None = None) -> str:
    """The card, in Markdown.

    Args:
        document: What `benchmarks.pretrained` has found.
        run: What `benchmarks.pretraining` has found of the training.
        dense_run: The same for the training of the model with dense attention, if it was scored.
    """
    info, settings = model_info(document["settings"]["model"]), document["settings"]
    corpus, facts = settings["corpus"], run["settings"]
    lines = [
        _HEAD.format(
            params=info.num_params,
            layers=info.config.num_layers,
            embed_dim=info.config.embed_dim,
            heads=info.config.num_heads,
            lengths=_series(info.pattern.segment_lengths),
            rates=_series(info.pattern.dilation_rates),
            reach=info.pattern.segment_lengths[-1],
        ),
        _DATA.format(
            python=document["environment"]["python"],
            val=corpus["num_bytes"]["val"] / 1e6,
            test=corpus["num_bytes"]["test"] / 1e6,
            fingerprint=corpus["fingerprint"],
        ),
        *_data_table(corpus),
        _TRAINING.format(
            **{**facts, "tokens": facts["tokens"] / 1e6},
            available=corpus["num_bytes"]["train"] / 1e6,
            cores=run["environment"]["cores"],
            device=run["environment"]["device"],
        ),
        _FIGURES.format(command=document["command"], words=_words(document, dense_run)),
        *TABLES["pretrained"](document),
        "",
        "Made by `python -m benchmarks.model_card`.",
    ]
    return "\n".join(line.rstrip("\n") for line in lines) + "\n"


def _data_table(corpus: dict[str, Any]) -> list[str]:
    rows = [
        [name, version, LICENCES[name], f"{corpus['bytes_of'][name] / 1e6:.1f} MB"]
        for name, version in corpus["versions"].items()
    ]
    return ["", *table(["source", "version", "licence", "size"], rows)]


def _words(document: Document, dense_run: Document | None) -> str:
    """What the table shows, in sentences."""
    cells = {(cell["way"], cell["context"]): cell["bits_per_byte"] for cell in figures(document)}
    contexts = document["settings"]["contexts"]
    first, last = min(contexts), max(contexts)
    own, whole = cells[SHIPPED, last], cells[XZ, None]
    compared = "fewer" if own < whole else "more"
    words = (
        f"From {first:,} to {last:,} bytes of context they fall from {cells[SHIPPED, first]:.3f} "
        f"to {own:.3f}. That is {abs(whole - own):.3f} {compared} than `xz -9e` needs for all "
        f"held-out files at once ({whole:.3f}), and {cells[XZ, last] - own:.3f} fewer than it "
        f"needs with the same context; untrained, the network needs {cells['random', last]:.2f}."
    )
    if dense_run is None:
        return words
    facts = dense_run["settings"]
    return (
        f"{words}\n\nWith dense attention and else alike (`{DENSE}`), {facts['flops']:.2e} FLOPs "
        f"read {facts['tokens'] / 1e6:.1f} million bytes in {facts['steps']:,} steps, with a "
        f"context of up to {facts['seq_len']:,}: {cells[DENSE, first]:.3f} at {first:,} bytes, "
        f"{cells[DENSE, last]:.3f} at {last:,}, which is {abs(own - cells[DENSE, last]):.3f} "
        f"{'fewer' if cells[DENSE, last] < own else 'more'} than dilated."
    )


def _series(numbers: tuple[int, ...]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


if __name__ == "__main__":
    main()
