"""Dilated attention against the usual pipeline, its bare kernel calls, and itself at 2 N.

The work is fixed by the pattern: about N * sum(w / r^2) pairs per head (half if causal), four
matrix multiply-adds per pair and channel forward and ten backward. What a schedule adds is memory
traffic: rows gathered, results scattered, branches mixed. The bare kernel calls have none of it,
the usual pipeline all. Contenders run in turn in one process; quote the ratios, not the seconds.

    python -m benchmarks.dilated_attention [--seq-len 32768] [--output results/cpu.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import alternate, finish, peak_extra_mib
from benchmarks.pipelines import bare_kernel_calls, usual_pipeline
from longnet_zoo.ops import DilatedPattern, dilated_attention
from longnet_zoo.ops.reference import dilated_attention_reference

Attention = Callable[[Tensor, Tensor, Tensor, DilatedPattern], Tensor]


def main() -> None:
    """Checks, measures, prints a table and one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-len", type=int, default=32768, help="tokens")
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--segment-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dilation-rates", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    pattern = DilatedPattern(
        segment_lengths=tuple(options.segment_lengths), dilation_rates=tuple(options.dilation_rates)
    )
    check_correct()
    results = measure(pattern, options.seq_len, options.num_heads, options.head_dim, options.rounds)
    report(results)
    finish({"benchmark": "dilated_attention", **vars(options), **results}, options.output)


def check_correct() -> None:
    """Refuses to time a wrong op: both ways of writing it against the dense float64 oracle."""
    pattern = DilatedPattern(segment_lengths=(16, 32), dilation_rates=(1, 2))
    q, k, v = torch.randn(3, 1, 64, 4, 16).unbind(0)
    expected = dilated_attention_reference(q, k, v, pattern, is_causal=True)
    for attend in (ours, usual_pipeline):
        torch.testing.assert_close(attend(q, k, v, pattern).double(), expected, atol=1e-5, rtol=0)


def ours(q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern) -> Tensor:
    """The library's causal dilated attention."""
    return dilated_attention(q, k, v, pattern, is_causal=True)


def measure(
    pattern: DilatedPattern, seq_len: int, num_heads: int, head_dim: int, rounds: int
) -> dict[str, Any]:
    """Times and peak memory of forward + backward, and their ratios."""
    run_ours = training_step(ours, pattern, seq_len, num_heads, head_dim)
    run_double = training_step(ours, pattern, 2 * seq_len, num_heads, head_dim)
    run_usual = training_step(usual_pipeline, pattern, seq_len, num_heads, head_dim)
    forward, backward = bare_kernel_calls(torch.empty(1, seq_len, num_heads, head_dim), pattern)

    def run_bare() -> None:
        forward()
        backward()

    timings = alternate(
        {"ours": run_ours, "usual": run_usual, "bare": run_bare, "double": run_double},
        rounds=rounds,
    )
    memory = {name: peak_extra_mib(run) for name, run in (("ours", run_ours), ("usual", run_usual))}
    flops = sum(pattern.flops(seq_len, num_heads, head_dim, is_causal=True))
    median = {name: timing.median_s for name, timing in timings.items()}
    return {
        "timings": {name: vars(timing) for name, timing in timings.items()},
        "peak_extra_mib": memory,
        "attended_pairs": pattern.attended_pairs(seq_len, num_heads, is_causal=True),
        "gflops_per_s": {name: flops / median[name] / 1e9 for name in ("ours", "usual", "bare")},
        "ratios": {
            "speed_over_usual": median["usual"] / median["ours"],
            "memory_over_usual": memory["ours"] / memory["usual"],
            "time_over_bare_kernels": median["ours"] / median["bare"],
            "time_at_double_length": median["double"] / median["ours"],
        },
    }


def training_step(
    attend: Attention, pattern: DilatedPattern, seq_len: int, num_heads: int, head_dim: int
) -> Callable[[], Any]:
    """A function that runs forward and backward on fixed random tensors."""
    shape = (1, seq_len, num_heads, head_dim)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    out_grad = torch.randn(shape)
    return lambda: torch.autograd.grad(attend(q, k, v, pattern), (q, k, v), out_grad)


def report(results: dict[str, Any]) -> None:
    """Prints the table."""
    for name, timing in results["timings"].items():
        low, median, high = timing["low_s"], timing["median_s"], timing["high_s"]
        print(f"{name:8} {median:8.3f} s   ({low:.3f} to {high:.3f})")
    for name, mib in results["peak_extra_mib"].items():
        print(f"{name:8} {mib:8.0f} MiB peak beyond the inputs")
    for name, ratio in results["ratios"].items():
        print(f"{name:24} {ratio:6.2f}")


if __name__ == "__main__":
    main()
