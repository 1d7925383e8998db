"""Draws the JSON files in benchmarks/results and writes docs/performance.md from them.

What needs a GPU and has no file says "not measured".

    python -m benchmarks.performance
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Parser
from benchmarks.pictures import DRAWN, draw_result
from benchmarks.tables import TABLES, Document, figures
from longnet_zoo.bench import reading
from longnet_zoo.ops.pattern import DilatedPattern

__all__ = ["GOALS", "page", "read_results"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

QUESTIONS = {
    "kernels": (
        "How fast is a kernel?",
        "Causal attention of one sequence, each contender in turn. `of dense`: share of the FLOP/s "
        "of PyTorch's best dense attention in the same run, at the length (in the table) at which "
        "it attends as many pairs. `vs usual`: times faster than the usual pipeline (gather, "
        "attend, scatter, stack, mix) on PyTorch's kernel; `memory of usual`: share of its peak "
        "memory beyond the inputs, which is in `MiB`. Bare kernel calls select and merge nothing: "
        "the least that this kernel can take.",
    ),
    "length": (
        "How does it grow with the length?",
        "One attention layer with its projections. Every length runs in turn with the shortest: "
        "`of the shortest's` is the ratio of times per token. `MiB` is beyond the input.",
    ),
    "streaming": (
        "What does a stream cost?",
        "A causal model with random weights, and the Python files of the standard library. Reading "
        "is `longnet-zoo stream`: `MiB` is the resident memory of the process (on a GPU what "
        "PyTorch has there) after the chunk that reaches this token, `most / first` the most of "
        "it after any chunk so far over that right after the first of the longest segments. At "
        "the end of a segment nothing of it is kept, so chunks that end there need no cache. "
        "Writing is `model.generate`, each position in turn, with a cache that keeps what can "
        "still be seen, or one pass over all tokens for each. The score is the same either way; "
        "its `peak MiB` is beyond the weights.",
    ),
    "pretraining": (
        "What did pretraining cost?",
        "`longnet_lm_tiny` on Python files, dilated as it ships and dense, for about the same "
        "FLOPs, which count the pairs that are attended. Bits per byte: in training the mean "
        "of the batches since the row before, at the context that these had; in validation at the "
        "longest context of the run, so that its steps compare, and runs do not. "
        "At the longest context dense attention would read a sixth as much for these FLOPs, so it "
        "learns at a shorter one.",
    ),
    "pretrained": (
        "What is a long context worth?",
        "Bits per byte of held-out Python files (fewer are better), ± the standard error from "
        "window to window. Every context scores the same bytes, in pieces that cannot see each "
        "other; `xz -9e` packs each piece by itself, and at last all held-out text at once.",
    ),
    "models": (
        "What does a training step cost?",
        "Forward, backward and AdamW of one sequence; `MiB` is the peak beyond weights and "
        "optimizer state. Checkpointing recomputes whole blocks, memory saving is the blockwise "
        "parallel Transformer: `model.set_grad_checkpointing()`, `model.set_memory_saving(...)`.",
    ),
    "memory": (
        "How much memory does a long training step take?",
        "The most that forward and backward hold at once beyond weights, their gradients and the "
        "input, float32, counted on tensors without content (`benchmarks/memory.py`).",
    ),
    "bench": (
        "From which length does it pay?",
        "`longnet-zoo bench`: self-attention with its projections, forward, at a fixed number of "
        "tokens, in milliseconds of one sequence. Vanilla is PyTorch's own attention.",
    ),
    "slide_encoder": (
        "And in a whole model?",
        "One slide through `gigapath_slide_enc12l768d`, with the same model around other attention "
        "ops: the usual pipeline, and the data movement of the released code.",
    ),
    "branches": (
        "When do branches by blocks and by content pay?",
        "Causal attention of one sequence, 4 heads x 64, by such a branch alone. `vs dense` and "
        "`vs masked`: times faster than PyTorch's causal attention, and than the same given a mask "
        "of all pairs; GFLOP/s count the pairs that are attended. Subsets draw queries and keys at "
        "random, and random vectors fill the buckets evenly. In the last table every query of "
        "the second half is a noisy copy of one early key, its planted key. `weights` is the share "
        "of the dense softmax that falls on keys which the branches show, `planted keys` the share "
        "of those that they show, at about as many attended pairs. A key that several branches "
        "show counts once in `keys a query`.",
    ),
}


# What the goals are measured with: settings, and sizes as (seq_len, num_heads, head_dim).
_PATTERN = {
    "segment_lengths": [2048, 4096, 8192, 16384, 32768],
    "dilation_rates": [1, 2, 4, 8, 16],
}
_SETTINGS = {
    "kernels": {"dtype": "bfloat16", **_PATTERN},
    "length": {"dtype": "bfloat16", **_PATTERN, "num_heads": 12, "head_dim": 64},
    "models": {"dtype": "bfloat16", "num_layers": None},
}
_SIZES = [(n, *heads) for n in (2**16, 2**20) for heads in ((12, 64), (16, 128))]


def _kernel_ratio(name: str, passed: str, best: Callable[..., float]) -> Callable[..., str | None]:
    """The worst over all sizes of the best backend's ratio."""

    def find(documents: list[Document]) -> str | None:
        by_size: dict[tuple[int, ...], list[float]] = {}
        for cell in (x for document in documents for x in figures(document)):
            size = (cell["seq_len"], cell["num_heads"], cell["head_dim"])
            if cell["kind"] == "dilated" and size in _SIZES and name in cell[passed]["ratios"]:
                by_size.setdefault(size, []).append(cell[passed]["ratios"][name])
        if 0 < len(by_size) < len(_SIZES):
            return f"{len(by_size)} of {len(_SIZES)} sizes"
        worst = min if best is max else max
        return f"{worst(map(best, by_size.values())):.2f}" if by_size else None

    return find


def _longest(passed: str, seq_len: int) -> Callable[[list[Document]], str | None]:
    def find(documents: list[Document]) -> str | None:
        for cell in (x for document in documents for x in figures(document)):
            if cell["pass"] == passed and cell["seq_len"] == seq_len:
                return f"{cell['median_ms'] / 1000:.2f} s"
        return None

    return find


def _million_tokens(documents: list[Document]) -> str | None:
    for cell in (x for document in documents for x in figures(document)):
        if cell["model"] == "longnet_lm_base" and cell["tokens"] == 2**20:
            return f"{cell['tokens_per_s']:,.0f} tokens/s, {cell['peak_extra_mib']:,.0f} MiB"
    return None


# What is to be reached on a GPU: goal, programme, and how its results answer.
GOALS: list[tuple[str, str, Callable[[list[Document]], str | None]]] = [
    (
        "forward: at least 0.8 of the FLOP/s of dense attention",
        "kernels",
        _kernel_ratio("flops_over_dense", "forward", max),
    ),
    (
        "forward + backward: at least 0.8 of the FLOP/s of dense attention",
        "kernels",
        _kernel_ratio("flops_over_dense", "forward+backward", max),
    ),
    (
        "forward + backward: at least 3 times as fast as the usual pipeline",
        "kernels",
        _kernel_ratio("speed_over_usual", "forward+backward", max),
    ),
    (
        "forward + backward: at most a third of its memory",
        "kernels",
        _kernel_ratio("memory_over_usual", "forward+backward", min),
    ),
    ("one layer, 16M tokens, forward", "length", _longest("forward", 2**24)),
    ("one layer, 4M tokens, forward + backward", "length", _longest("forward+backward", 2**22)),
    ("`longnet_lm_base`, a training step of 1M tokens", "models", _million_tokens),
]


def main() -> None:
    """Draws, then writes the page."""
    parser = Parser(__doc__)
    parser.parse_args()
    try:
        results = read_results(RESULTS)
        for name in results:
            draw_result(RESULTS / f"{name}.json")
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} from {len(results)} results")


def read_results(folder: Path) -> dict[str, Document]:
    """Every result by name of its file, without those of dry runs.

    Raises:
        ValueError: If a file is not what a programme has written.
    """
    results = {}
    for file in sorted(folder.glob("*.json")):
        if file.stem.endswith("-dry"):
            continue
        with reading(file):
            results[file.stem] = document = json.loads(file.read_text(encoding="utf-8"))
            _section(file.stem, document)  # has all that the page needs
    return results


def page(results: dict[str, Document]) -> str:
    """The page, in Markdown."""
    lines = [
        "# Performance",
        "",
        "Made by `python -m benchmarks.performance` from the files in `benchmarks/results`; "
        "`make bench` measures those of a CPU, all but pretraining. Quote the ratios: contenders "
        "of one table took turns in one process. Seconds depend on the machine.",
        "",
        "## Measured where",
        "",
        *_places(results),
        "",
        "## On a GPU",
        "",
        *_goals(results),
    ]
    for benchmark, (title, words) in QUESTIONS.items():
        chosen = {name: x for name, x in results.items() if x["benchmark"] == benchmark}
        lines += ["", f"## {title}", "", words]
        for name, document in chosen.items():
            lines += _section(name, document)
        if not chosen:
            lines += ["", "Not measured."]
    return "\n".join(lines) + "\n"


def _places(results: dict[str, Document]) -> list[str]:
    lines = ["| result | machine | versions | when |", "|---|---|---|---|"]
    for name, document in results.items():
        machine = document["environment"]
        threads = f", threads: {machine['threads']}" if machine["device_type"] == "cpu" else ""
        when = f"{machine['date']}, commit {machine['commit'] or 'unknown'}"
        if not document.get("is_complete", True):
            when += ", stopped early"
        versions = f"PyTorch {machine['torch']}, Python {machine['python']}"
        lines.append(f"| `{name}` | {machine['device']}{threads} | {versions} | {when} |")
    return lines


def _goals(results: dict[str, Document]) -> list[str]:
    lines = [
        "`benchmarks/gpu.sh` measures all of this in one call of under 9 minutes on one H200-class "
        "GPU. bfloat16; segments 2,048 to 32,768, rates 1 to 16; 12 heads x 64 and 16 x 128; "
        "65,536 to 1,048,576 tokens, the worst of these sizes.",
        "",
        "| to be reached | measured |",
        "|---|---|",
    ]
    for goal, benchmark, find in GOALS:
        documents = [
            document
            for document in results.values()
            if document["benchmark"] == benchmark
            and document["environment"]["device_type"] == "cuda"
            and _SETTINGS[benchmark].items() <= document["settings"].items()
        ]
        lines.append(f"| {goal} | {find(documents) or 'not measured'} |")
    return lines


def _section(name: str, document: Document) -> list[str]:
    machine, settings = document["environment"], document.get("settings", {})
    lines = ["", f"### {machine['device']}: `{name}`"]
    facts = [f"{settings[x]}" for x in ("dtype",) if x in settings]
    if "segment_lengths" in settings:
        lengths, rates = settings["segment_lengths"], settings["dilation_rates"]
        is_dense = DilatedPattern(segment_lengths=lengths, dilation_rates=rates).is_dense
        pattern = f"segments {_series(lengths)}, rates {_series(rates)}"
        facts.append("dense attention" if is_dense else pattern)
    if settings.get("piece_len"):
        facts.append(f"in pieces of {settings['piece_len']:,} tokens")
    if facts:
        lines += ["", f"{'; '.join(facts)}."]
    if "command" in document:
        lines += ["", f"    {document['command']}"]
    if document.get("cells") == []:
        return [*lines, "", "No cell is finished."]
    lines += TABLES[document["benchmark"]](document)
    if document["benchmark"] in DRAWN and figures(document):
        lines += ["", f"![{name}](../benchmarks/results/{name}.svg)"]
    return lines


def _series(numbers: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


if __name__ == "__main__":
    main()
