"""Fills in what pages say of the library from the library itself: `python -m docs.generate`.

A page keeps its place between two comments, `<!-- generated: NAME -->` and `<!-- end -->`, where
NAME is a function of `GENERATORS`. A test fails while a page says something else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longnet_zoo.bench import markdown_table
from longnet_zoo.cli import short_number
from longnet_zoo.factory import ModelInfo, list_models, model_info
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.planner import Network, PlanConfig, describe, plan_step
from longnet_zoo.registry import PublishedWeights, find_model

__all__ = ["GENERATORS", "choose_pattern", "main", "write_page"]

DOCS = Path(__file__).resolve().parent
# The model of the tables of patterns: the paper's of 125M parameters. Beyond segments of about
# 60,000 tokens its xPos would overflow, so positions are rotary throughout.
_MODEL, _POSITION = "longnet_lm_base", "rotary"
_NEAR = 2048
_LENGTHS = tuple(2**power for power in range(11, 21))
_PLACE = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def main() -> None:
    """Writes every page anew."""
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(write_page(text), encoding="utf-8")


def write_page(text: str) -> str:
    """Returns a page with its generated parts as they should be."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{GENERATORS[found[2]]()}\n\n{found[3]}", text)


def choose_pattern(seq_len: int, *, near: int = _NEAR) -> DilatedPattern:
    """Makes the pattern of the page's rule of thumb; `seq_len` is `near` times a power of two.

    The first branch sees `near` tokens whole, the last one the whole sequence. Up to 16 times
    `near` each branch is twice as long and thin as the one before, as in the paper; beyond that
    four times, with one step of two where the powers of four do not come out.
    """
    if seq_len <= 16 * near:
        return DilatedPattern.geometric(min(near, seq_len), seq_len)
    rates = [seq_len // near]
    while rates[-1] > 1:
        rates.append(rates[-1] // (4 if rates[-1] >= 4 else 2))
    rates.reverse()
    return DilatedPattern(
        segment_lengths=tuple(near * rate for rate in rates), dilation_rates=tuple(rates)
    )


def models() -> str:
    """The tables of all models, one for each modality."""
    infos = [model_info(name) for name in list_models()]
    parts = []
    for modality in sorted({info.modality for info in infos}):
        rows = [_model_row(info) for info in infos if info.modality == modality]
        head = ("name", "what", "parameters", "usual length", "forward FLOPs", "pattern", "source")
        parts.append(f"## {modality.capitalize()}\n\n{markdown_table(head, rows, right=(2, 3, 4))}")
    return "\n\n".join(parts)


def weights() -> str:
    """The table of published weights."""
    rows = [
        (f"`{name}`", f"`{own.tag}`", _address(own), own.licence, own.note)
        for name in list_models(pretrained=True)
        for own in find_model(name).weights
    ]
    return markdown_table(("model", "tag", "where", "licence", "to know"), rows)


def lengths() -> str:
    """What the rule of thumb gives for each length, and what it costs."""
    head = (
        "tokens",
        "segment length : rate",
        "keys of a token",
        "of dense",
        "attention's share of FLOPs",
        "the same, dense",
        "memory of a step",
        "time of a step",
        "the same, dense",
    )
    rows = [
        (f"{seq_len:,}", _branches(pattern), *_costs(pattern, seq_len))
        for seq_len, pattern in ((n, choose_pattern(n)) for n in _LENGTHS)
    ]
    return markdown_table(head, rows, right=[0, *range(2, len(head))])


def reach() -> str:
    """What each branch of the rule's pattern for a million tokens sees."""
    return _reach(choose_pattern(_LENGTHS[-1]), find_model(_MODEL).config.num_heads)


def covering() -> str:
    """The same for the pattern of Prov-GigaPath's encoder, whose rates end at its heads."""
    config = find_model("gigapath_slide_enc12l768d").config
    return _reach(config.pattern, config.num_heads)


def _costs(pattern: DilatedPattern, seq_len: int) -> Iterator[str]:
    dense = DilatedPattern(segment_lengths=(seq_len,), dilation_rates=(1,))
    network = _network()
    num_heads, head_dim = network.num_heads, network.head_dim
    pairs, all_pairs = (
        x.attended_pairs(seq_len, num_heads, is_causal=True) for x in (pattern, dense)
    )
    yield f"{pairs / num_heads / seq_len:,.0f}"
    yield f"{pairs / all_pairs:.2g}"
    for own in (pattern, dense):
        forward, _ = own.flops(seq_len, num_heads, head_dim, is_causal=True)
        attention = network.num_layers * forward
        yield f"{attention / (attention + network.linear_flops(seq_len)):.0%}"
    plans = [_plan(x, seq_len) for x in (pattern, dense)]
    yield f"{plans[0].memory.total / 2**30:.1f} GiB"
    yield from (_seconds(plan.time.step_s) for plan in plans)


@functools.cache
def _network() -> Network:
    return describe(_MODEL, {})


def _plan(pattern: DilatedPattern, seq_len: int) -> Any:
    options = {
        "segment_lengths": pattern.segment_lengths,
        "dilation_rates": pattern.dilation_rates,
        "position": _POSITION,
    }
    config = PlanConfig(model=_MODEL, options=options, seq_len=seq_len)
    return plan_step(config, longest=False).methods[0]


def _reach(pattern: DilatedPattern, num_heads: int) -> str:
    """A row for each branch, in a sequence as long as the longest segment."""
    seq_len = pattern.segment_lengths[-1]
    rows, total = [], pattern.attended_pairs(seq_len, num_heads)
    for number, (length, rate) in enumerate(pattern.branches):
        branch = DilatedPattern(segment_lengths=(length,), dilation_rates=(rate,))
        num_offsets = len(set(pattern.offsets(number, num_heads)))
        rows.append(
            (
                f"{length:,}",
                f"{rate:,}",
                f"{len(range(0, length, rate)):,}",
                f"{length - 1:,}",
                f"{1 / rate:.3g}",
                f"{num_offsets / rate:.3g}",
                f"{branch.attended_pairs(seq_len, num_heads) / total:.1%}",
            )
        )
    head = (
        "segment length",
        "rate",
        "keys of a query",
        "farthest key",
        "rows, one head",
        f"rows, {num_heads} heads",
        "share of the work",
    )
    return markdown_table(head, rows, right=range(len(head)))


def _model_row(info: ModelInfo) -> tuple[str, ...]:
    pattern = "dense" if info.pattern.is_dense else _branches(info.pattern)
    return (
        f"`{info.name}`",
        info.description,
        short_number(info.num_params),
        f"{info.seq_len:,}",
        short_number(info.flops),
        pattern,
        info.source,
    )


def _address(own: PublishedWeights) -> str:
    return "in this package" if own.is_shipped else f"`{own.location}`"


def _branches(pattern: DilatedPattern) -> str:
    return ", ".join(f"{length:,} : {rate}" for length, rate in pattern.branches)


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


GENERATORS: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (models, weights, lengths, reach, covering)
}

if __name__ == "__main__":
    main()
