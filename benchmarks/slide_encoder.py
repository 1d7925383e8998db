"""A whole slide through the released slide encoder, ours against the usual pipeline.

One forward pass of `gigapath_slide_enc12l768d`, in inference mode and float32, with random weights
and the attention of the published ones. The other contenders are the same model with another
attention op around the same fused kernel (`pipelines.py`): "released" moves data as the code that
the weights came with, "usual" gathers, scatters, stacks and mixes with fewer copies.
All run in turn in one process; quote the ratios, not the seconds.

    python -m benchmarks.slide_encoder [--num-tiles 10000] [--output results/slide.json]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Parser, alternate, at_least_1, check_output, finish
from benchmarks.pipelines import released_pipeline, usual_pipeline
from benchmarks.record import run_programme
from longnet_zoo.factory import create_model
from longnet_zoo.models import GigaPathSlideEncoder
from longnet_zoo.ops import DilatedPattern, dilated_attention

NAME = "gigapath_slide_enc12l768d"
TOLERANCE = 1e-4

AttentionOp = Callable[..., Tensor]


def main(options: argparse.Namespace) -> int:
    """Checks, measures, prints a table and one JSON document."""
    if options.output is not None:
        check_output(options.output)
    torch.set_num_threads(options.num_threads)
    results = measure(options.num_tiles, options.num_layers, options.rounds)
    for name, timing in results["timings"].items():
        low, median, high = timing["low_s"], timing["median_s"], timing["high_s"]
        print(f"{name:8} {median:8.3f} s   ({low:.3f} to {high:.3f})")
    for name, ratio in results["ratios"].items():
        print(f"{name:20} {ratio:.3f}")
    finish(
        {"benchmark": "slide_encoder", "model": NAME, **vars(options), **results}, options.output
    )
    return 0


def measure(num_tiles: int, num_layers: int, rounds: int) -> dict[str, Any]:
    """Times of one forward pass and their ratio; refuses to time outputs that differ."""
    model = create_model(
        NAME, num_layers=num_layers, head_offset="block", padded_keys="zero"
    ).eval()
    tiles, coords = draw_slide(num_tiles)
    runs = {
        "ours": partial(embed, model, tiles, coords, dilated_attention),
        "usual": partial(embed, model, tiles, coords, as_op(usual_pipeline)),
        "released": partial(embed, model, tiles, coords, as_op(released_pipeline)),
    }
    ours, *others = (run() for run in runs.values())  # the warm-up, too
    for other in others:
        torch.testing.assert_close(other, ours, atol=TOLERANCE, rtol=0)
    timings = alternate(runs, rounds=rounds, warmup=0)
    median = {name: timing.median_s for name, timing in timings.items()}
    return {
        "timings": {name: vars(timing) for name, timing in timings.items()},
        "ratios": {
            "time_over_released": median["ours"] / median["released"],
            "time_over_usual": median["ours"] / median["usual"],
        },
        "largest_difference": max((other - ours).abs().max().item() for other in others),
        "gflops": model.flops(num_tiles) / 1e9,
    }


def draw_slide(num_tiles: int) -> tuple[Tensor, Tensor]:
    """Random tile embeddings on a square of the grid, column by column."""
    side = math.ceil(math.sqrt(num_tiles))
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))[:num_tiles]
    return torch.randn(1, num_tiles, 1536), 256 * cells[None]


@torch.inference_mode()
def embed(
    model: GigaPathSlideEncoder, tiles: Tensor, coords: Tensor, attention_op: AttentionOp
) -> Tensor:
    """Embeds a slide with an attention op in all blocks."""
    for block in model.stack.blocks:
        block.attention.attention_op = attention_op
    return model(tiles, coords)


def as_op(pipeline: AttentionOp) -> AttentionOp:
    """A pipeline with the signature of an attention op; it has none of the other options."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, *, is_causal: bool, **options: Any
    ) -> Tensor:
        asked = {name: x for name, x in options.items() if x and name != "backend"}
        if asked:
            raise NotImplementedError(f"the pipelines have no {', '.join(asked)}.")
        return pipeline(q, k, v, pattern, is_causal=is_causal)

    return attend


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--num-tiles", type=at_least_1, default=10_000)
    parser.add_argument("--num-layers", type=at_least_1, default=12)
    parser.add_argument("--num-threads", type=at_least_1, default=2)
    parser.add_argument("--rounds", type=at_least_1, default=5, help="timed rounds")
    parser.add_argument("--output", type=Path, help="JSON file, overwritten")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
