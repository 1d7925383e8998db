"""Results as Markdown: one table for each programme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.contenders import PASSES
from longnet_zoo.bench import markdown_table

__all__ = ["TABLES", "Document", "figures", "flops_unit"]

Document = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, figures to the right."""
    return markdown_table(header, rows, right=range(1, len(header))).splitlines()


def figures(document: Document) -> list[dict[str, Any]]:
    """The cells that hold figures."""
    return [cell for cell in document["cells"] if "reason" not in cell]


def flops_unit(document: Document) -> tuple[str, float]:
    """Unit of FLOP/s that suits the machine, and how many of it a TFLOP/s is."""
    is_cuda = document["environment"]["device_type"] == "cuda"
    return ("TFLOP/s", 1) if is_cuda else ("GFLOP/s", 1000)


def _short(number: float) -> str:
    """Three significant digits, thousands apart, no exponent."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{float(f'{number:.3g}'):g}"


def _ratio(cell: dict[str, Any], name: str) -> str:
    return f"{cell['ratios'][name]:.2f}" if name in cell["ratios"] else "-"


def _size(cell: dict[str, Any]) -> str:
    return f"{cell['seq_len']:,} tokens, {cell['num_heads']} heads x {cell['head_dim']}"


def _kernels(document: Document) -> list[str]:
    lines = []
    unit, factor = flops_unit(document)
    columns = ["ms", unit, "of dense", "MiB", "vs usual", "memory of usual"]
    for size in dict.fromkeys(map(_size, document["cells"])):
        cells = [cell for cell in figures(document) if _size(cell) == size]
        for passed in PASSES:
            rows = [
                [
                    _contender(cell),
                    _short(cell[passed]["median_ms"]),
                    _short(factor * cell[passed]["tflops_per_s"]),
                    _ratio(cell[passed], "flops_over_dense"),
                    _short(cell[passed]["peak_extra_mib"]),
                    _ratio(cell[passed], "speed_over_usual"),
                    _ratio(cell[passed], "memory_over_usual"),
                ]
                for cell in cells
            ]
            lines += ["", *table([f"{size}, {passed}", *columns], rows)]
    return [*lines, *_reasons(document, lambda cell: cell["contender"])]


def _contender(cell: dict[str, Any]) -> str:
    if "dense_len" in cell:
        return f"{cell['contender']}, {cell['dense_len']:,}"
    if "largest_difference" in cell:
        return f"{cell['contender']} (off by {_short(cell['largest_difference'])})"
    return str(cell["contender"])


def _reasons(document: Document, name: Callable[[dict[str, Any]], str]) -> list[str]:
    """What did not run, each reason once."""
    reasons: dict[str, str] = {}
    for cell in document["cells"]:
        if "reason" in cell:
            reasons.setdefault(name(cell), cell["reason"])
    if not reasons:
        return []
    return ["", "Did not run:", "", *(f"- {name}: {reason}" for name, reason in reasons.items())]


def _length(document: Document) -> list[str]:
    rows = [
        [
            f"{cell['pass']}, {cell['seq_len']:,}",
            _short(cell["median_ms"]),
            _short(cell["us_per_token"]),
            _ratio(cell, "time_per_token_over_shortest"),
            _short(cell["peak_extra_mib"]),
            _short(cell["kib_per_token"]),
        ]
        for cell in figures(document)
    ]
    header = ["pass, tokens", "ms", "us per token", "of the shortest's", "MiB", "KiB per token"]
    lines = ["", *table(header, rows), ""]
    longest = document["settings"]["segment_lengths"][-1]
    for passed, slope in document.get("slopes", {}).items():
        if slope:
            lines.append(
                f"{passed}: time grows as N^{slope['time']:.2f}, memory as N^{slope['memory']:.2f} "
                f"from N = {longest:,} on."
            )
    return [*lines, *_reasons(document, lambda cell: f"{cell['pass']}, {cell['seq_len']:,} tokens")]


def _models(document: Document) -> list[str]:
    rows = [
        [
            f"`{cell['model']}`, {cell['tokens']:,} tokens, {_mode(cell)}",
            _short(cell["tokens_per_s"]),
            _short(cell["peak_extra_mib"]),
            _over_plain(cell, "time_over"),
            _over_plain(cell, "memory_over"),
        ]
        for cell in figures(document)
    ]
    lines = ["", *table(["model", "tokens/s", "MiB", "time of plain", "memory of plain"], rows)]
    depth = document["settings"]["num_layers"]
    note = ["", f"All models are cut to {depth} layers (`--num-layers {depth}`)."] if depth else []
    return [*lines, *note, *_reasons(document, lambda cell: f"{cell['case']}, {cell['mode']}")]


def _mode(cell: dict[str, Any]) -> str:
    chunks = f" by {cell['chunk_size']:,} tokens" if "chunk_size" in cell else ""
    return f"{cell['mode']}{chunks}"


def _over_plain(cell: dict[str, Any], name: str) -> str:
    return _ratio(cell, name) if cell["ratios"]["over"] == "plain" else "-"


def _bench(document: Document) -> list[str]:
    kinds = list(document["cells"][0]["ms"])
    rows = [
        [
            f"{cell['batch']} x {cell['seq_len']:,}",
            *(f"{cell['ms'][kind]['median']:.1f}" for kind in kinds),
            "-" if cell["advantage"] is None else f"{cell['advantage']:.2f}x",
        ]
        for cell in document["cells"]
    ]
    return ["", *table(["batch x tokens", *(f"{kind}, ms" for kind in kinds), "advantage"], rows)]


def _memory(document: Document) -> list[str]:
    rows = [
        [
            f"{row['mode']}, hidden channels {row['ffn_factor']} x",
            f"{row['peak_mib']:,.0f}",
            f"{row['of_plain']:.3f}",
        ]
        for row in document["rows"]
    ]
    size = f"{document['num_layers']} layers, {document['seq_len']:,} tokens"
    title = f"`{document['model']}`, {size}"
    return ["", *table([title, "peak MiB", "of plain"], rows)]


def _slide_encoder(document: Document) -> list[str]:
    """The ratios, as they are named."""
    rows = [[name.replace("_", " "), f"{x:.3g}"] for name, x in document["ratios"].items()]
    size = f"{document['num_tiles']:,} tiles, {document['num_layers']} layers"
    return ["", *table([size, "ratio"], rows)]


def _streaming(document: Document) -> list[str]:
    """Reading, writing, score: a table for each part that has figures."""
    parts: dict[str, list[dict[str, Any]]] = {"reading": [], "writing": [], "score": []}
    for cell in figures(document):
        parts[cell["part"]].append(cell)
    columns = ["MiB", "beyond the start", "of it the cache", "most / first", "tokens/s"]
    reading = [
        [
            f"{cell['position']:,}, by {cell['chunk_size']:,}",
            *(_short(cell[name]) for name in ("resident_mib", "extra_mib", "cache_mib")),
            f"{cell['ratios']['most_over_first']:.3f}",
            _short(cell["tokens_per_s"]),
        ]
        for cell in parts["reading"]
    ]
    writing = [
        [
            f"{cell['position']:,}, {'with a cache' if cell['is_cached'] else 'one pass each'}",
            *(_short(cell[name]) for name in ("median_ms", "low_ms", "high_ms")),
            _ratio(cell, "time_over_shortest"),
        ]
        for cell in parts["writing"]
    ]
    score = [
        [
            f"{cell['num_bytes']:,}, {cell['way']}",
            f"{cell['bits_per_byte']:.4f}",
            f"{cell['difference']:.1e}",
            _short(cell["peak_extra_mib"]),
            _ratio(cell, "memory_over_one_pass"),
        ]
        for cell in parts["score"]
    ]
    lines = []
    for header, rows in (
        (["tokens read", *columns], reading),
        (["a token after", "ms", "20 %", "80 %", "of the shortest's"], writing),
        (["bytes", "bits per byte", "less one pass", "peak MiB", "of one pass"], score),
    ):
        lines += ["", *table(header, rows)] if rows else []
    return [*lines, *_reasons(document, lambda cell: cell["part"])]


def _pretrained(document: Document) -> list[str]:
    """A row for each context, a column for each model and for xz."""
    cells = figures(document)
    ways = list(dict.fromkeys(cell["way"] for cell in cells))
    rows = []
    for context in dict.fromkeys(cell["context"] for cell in cells):
        found = {cell["way"]: cell for cell in cells if cell["context"] == context}
        size = found[ways[0]]["num_bytes"] if ways[0] in found else 0
        name = f"{context:,}" if context else f"all {size / 1e6:.1f} MB at once"
        rows.append([name, *(_bits(found[way]) if way in found else "-" for way in ways)])
    lines = ["", *table(["context", *ways], rows)]
    return [*lines, *_reasons(document, lambda cell: cell["way"])]


def _pretraining(document: Document) -> list[str]:
    """What was spent, then how it learned."""
    run = document["settings"]
    lines = [
        "",
        f"{run['steps']:,} steps, {run['tokens'] / 1e6:.1f} million tokens, "
        f"{run['flops']:.2e} FLOPs, {run['hours']:.1f} hours; {run['optimizer']}, "
        f"learning rate {run['lr']:g}, {run['precision']}.",
    ]
    rows = [
        [
            f"{cell['step']:,}",
            f"{cell['context']:,}",
            f"{cell['tokens'] / 1e6:.1f}",
            f"{cell['flops']:.1e}",
            *(_loss(cell, split) for split in ("train", "val")),
        ]
        for cell in figures(document)
    ]
    header = ["step", "context", "million tokens", "FLOPs", "training", "validation"]
    return [*lines, "", *table(header, rows)]


def _loss(cell: dict[str, Any], split: str) -> str:
    bits = cell.get(f"{split}_bits_per_byte")
    return "-" if bits is None else f"{bits:.3f}"


def _bits(cell: dict[str, Any]) -> str:
    error = cell["standard_error"]
    return f"{cell['bits_per_byte']:.3f}" + (f" ± {error:.3f}" if error else "")


def _branches(document: Document) -> list[str]:
    """Speed by length and pass, then what of dense attention is kept."""
    lines: list[str] = []
    speed, recall = (
        [cell for cell in figures(document) if cell["part"] == part] for part in ("speed", "recall")
    )
    columns = ["ms", "GFLOP/s", "vs dense", "vs masked", "MiB"]
    for seq_len in dict.fromkeys(cell["seq_len"] for cell in speed):
        for passed in PASSES:
            rows = [
                [
                    cell["contender"],
                    _short(cell[passed]["median_ms"]),
                    _short(cell[passed]["gflops_per_s"]),
                    *(_ratio(cell[passed], f"speed_over_{x}") for x in ("dense", "masked")),
                    _short(cell[passed]["peak_extra_mib"]),
                ]
                for cell in speed
                if cell["seq_len"] == seq_len
            ]
            lines += ["", *table([f"{seq_len:,} tokens, {passed}", *columns], rows)]
    if not recall:
        return lines
    header = [f"{recall[0]['seq_len']:,} tokens", "keys a query", "weights", "planted keys"]
    rows = [
        [
            cell["branches"],
            _short(cell["keys_per_query"]),
            f"{cell['mass']:.3f}",
            f"{cell['planted']:.3f}",
        ]
        for cell in recall
    ]
    return [*lines, "", *table(header, rows)]


# Programme -> lines of Markdown of its results.
TABLES: dict[str, Callable[[Document], list[str]]] = {
    "kernels": _kernels,
    "length": _length,
    "streaming": _streaming,
    "pretraining": _pretraining,
    "pretrained": _pretrained,
    "models": _models,
    "memory": _memory,
    "bench": _bench,
    "slide_encoder": _slide_encoder,
    "branches": _branches,
}
