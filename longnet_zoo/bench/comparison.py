"""Dilated against vanilla attention over sequence lengths, at a fixed number of tokens.

Both are self-attention with the same projections, forward, in one process and in turn; only the
attention between them differs: PyTorch's `scaled_dot_product_attention`, or dilated attention. With
a fixed number of tokens, vanilla attention takes time in proportion to the length of a sequence,
dilated attention about the same for any. Options and lines of output are those of the benchmark of
github.com/alexisrozhkov/dilated-self-attention.

Shape legend: b batch, n seq_len, h num_heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.kernels import BACKENDS
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference

from .measure import alternate, available_mib, choose_device
from .picture import Panel

__all__ = ["ComparisonConfig", "Lengths", "compare", "describe", "header", "panels"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Half types against a float64 oracle; float32 is held to a tolerance near its own rounding.
_TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-2}
_CHECKED_LEN = 150
_DENSE = DilatedPattern(segment_lengths=(_CHECKED_LEN,), dilation_rates=(1,))
_DILATED = DilatedPattern(segment_lengths=(16, 64, 128), dilation_rates=(1, 4, 16))


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What is compared, and on what.

    Attributes:
        is_dilated: Time dilated (True) or vanilla attention (False), or both in turn (None).
        max_seq_len: Longest sequence in tokens, and tokens of every batch.
        num_seq_lens: Number of lengths, each twice the one before.
        num_iter: Timed calls of each.
        num_heads: Attention heads.
        emb_dim: Channels of the input, a multiple of `num_heads`.
        segment_lengths: Tokens per segment of each branch.
        dilation_rates: Dilation rate of each branch.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`.
        backend: Kernel of dilated attention; `"auto"` where that is not timed.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: If a value is out of range, or sizes do not divide.
    """

    is_dilated: bool | None = None
    max_seq_len: int = 16384
    num_seq_lens: int = 4
    num_iter: int = 10
    num_heads: int = 3
    emb_dim: int = 384
    segment_lengths: tuple[int, ...] = (1024, 4096, 16384)
    dilation_rates: tuple[int, ...] = (1, 4, 16)
    device: str = "auto"
    backend: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "num_seq_lens", "num_iter", "num_heads", "emb_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        if self.max_seq_len % 2 ** (self.num_seq_lens - 1):
            raise ValueError(
                "max_seq_len must be divisible by 2 ** (num_seq_lens - 1), got "
                f"max_seq_len={self.max_seq_len} and num_seq_lens={self.num_seq_lens}. "
                "Take a power of two, or fewer lengths."
            )
        if self.emb_dim % self.num_heads:
            raise ValueError(
                f"emb_dim must be a multiple of num_heads, got emb_dim={self.emb_dim} and "
                f"num_heads={self.num_heads}."
            )
        for name, allowed in (("backend", BACKENDS), ("dtype", tuple(_TOLERANCES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.is_dilated is False and self.backend != "auto":
            raise ValueError(
                "backend is of dilated attention, which is_dilated=False does not time, got "
                f"backend={self.backend!r}. Leave one of the two out."
            )
        _ = self.pattern

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern of dilated attention."""
        return DilatedPattern(
            segment_lengths=self.segment_lengths, dilation_rates=self.dilation_rates
        )

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Lengths in tokens, shortest first."""
        return tuple(self.max_seq_len >> place for place in reversed(range(self.num_seq_lens)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is timed: `"vanilla"`, `"dilated"`, or both."""
        if self.is_dilated is None:
            return ("vanilla", "dilated")
        return ("dilated",) if self.is_dilated else ("vanilla",)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Times at one sequence length.

    Attributes:
        seq_len: Tokens of a sequence.
        batch: Sequences of a call.
        ms: Milliseconds of one sequence (the time of a call over `batch`): `median`, `low` and
            `high` (20 % and 80 % quantiles) of each kind.
        advantage: Time of vanilla over that of dilated attention; None if one was not run.
    """

    seq_len: int
    batch: int
    ms: dict[str, dict[str, float]]
    advantage: float | None


def compare(
    config: ComparisonConfig,
    *,
    on_run: Callable[[str], None] = lambda name: None,
    skipped: Collection[int] = (),
) -> Iterator[Lengths]:
    """Checks what is timed against the float64 oracle, then yields the times length by length.

    Args:
        config: What to compare.
        on_run: Called after every call, for a progress bar: with warm-up `num_iter + 1` times for
            each kind and length.
        skipped: Lengths that are not timed.

    Raises:
        ValueError: If memory does not suffice for a batch.
        RuntimeError: If the device is not there, or a result is wrong.
        NotImplementedError: If the named backend cannot serve the call, with the reason.
    """
    device, dtype = choose_device(config.device), getattr(torch, config.dtype)
    _check_memory(config, device, dtype)
    for kind in config.kinds:
        _check(kind, config, device, dtype)
    layer = _Projections(config).to(device, dtype)
    for seq_len in (x for x in config.seq_lens if x not in skipped):
        batch = config.max_seq_len // seq_len
        x = torch.randn(batch, seq_len, config.emb_dim, device=device, dtype=dtype)
        runs = {
            kind: partial(layer, x, _attention(kind, config.pattern, config.backend))
            for kind in config.kinds
        }
        with torch.no_grad():
            timings = alternate(runs, rounds=config.num_iter, on_run=on_run)
        ms = {
            kind: {
                name.removesuffix("_s"): 1000 * seconds / batch
                for name, seconds in asdict(timing).items()
            }
            for kind, timing in timings.items()
        }
        is_both = len(ms) == 2
        advantage = ms["vanilla"]["median"] / ms["dilated"]["median"] if is_both else None
        yield Lengths(seq_len=seq_len, batch=batch, ms=ms, advantage=advantage)


def _check_memory(config: ComparisonConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a batch whose input, q, k, v and outputs alone do not fit."""
    needed_mib = 6 * config.max_seq_len * config.emb_dim * dtype.itemsize / 2**20
    free_mib = available_mib(device)
    if needed_mib > free_mib:
        raise ValueError(
            f"max_seq_len={config.max_seq_len} and emb_dim={config.emb_dim} in {config.dtype} need "
            f"at least {needed_mib:,.0f} MiB, but {free_mib:,.0f} are free on {device}. Take fewer "
            "tokens."
        )


class _Projections(nn.Module):
    """What stands before and after the attention, the same for both kinds."""

    def __init__(self, config: ComparisonConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim)
        self.out = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attends x, (b, n, h * d)."""
        q, k, v = rearrange(self.qkv(x), "b n (c h d) -> c b n h d", c=3, h=self.num_heads)
        return self.out(rearrange(attend(q, k, v), "b n h d -> b n (h d)"))


def _attention(kind: str, pattern: DilatedPattern, backend: str) -> Attend:
    """Causal attention (b, n, h, d) of a kind."""
    if kind == "vanilla":
        return _vanilla
    return partial(dilated_attention, pattern=pattern, is_causal=True, backend=backend)


def _vanilla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _check(kind: str, config: ComparisonConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses to time a wrong result; dilated attention is checked with short segments."""
    shape = (2, _CHECKED_LEN, config.num_heads, config.emb_dim // config.num_heads)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    pattern = {"vanilla": _DENSE, "dilated": _DILATED}[kind]
    with torch.no_grad():
        found = _attention(kind, pattern, config.backend)(q, k, v).double()
    expected = dilated_attention_reference(q, k, v, pattern, is_causal=True)
    assert isinstance(expected, Tensor)
    error = (found - expected).abs().max().item()
    # A NaN is wrong too.
    if not error <= _TOLERANCES[config.dtype]:
        raise RuntimeError(
            f"{kind} attention with backend={config.backend!r} in {config.dtype} is off by "
            f"{error:.3g} from the float64 oracle, so it is not timed. Try another backend."
        )


def header(config: ComparisonConfig) -> str:
    """Line with the names of the columns of `describe`; empty if there is one."""
    return f"{'vanilla':>12} {'dilated':>12} {'advantage':>11}\n" if len(config.kinds) == 2 else ""


def describe(result: Lengths) -> str:
    """Two lines: `{batch} x {seq_len}:`, and the milliseconds of each kind with the advantage."""
    columns = [f"{ms['median']:.1f} ms" for ms in result.ms.values()]
    if result.advantage is not None:
        columns = [*(f"{column:>12}" for column in columns), f"{result.advantage:10.2f}x"]
    return f"{result.batch} x {result.seq_len}:\n" + " ".join(columns)


def panels(results: list[Lengths]) -> list[Panel]:
    """Charts: milliseconds of a sequence, and the advantage where both were run."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for kind, ms in result.ms.items():
            lines.setdefault(kind, []).append((result.seq_len, ms["median"]))
    x_label = "sequence length (tokens)"
    drawn = [Panel(title="milliseconds per sequence", lines=lines, x_label=x_label)]
    points = [(x.seq_len, x.advantage) for x in results if x.advantage is not None]
    if points:
        title = "advantage: time of vanilla over dilated"
        advantage: dict[str, Any] = {"advantage": points}
        drawn.append(Panel(title=title, lines=advantage, x_label=x_label, y_scale="linear"))
    return drawn
