"""Who runs in `benchmarks.kernels`: every backend, dense attention, the usual pipeline, packages.

Shape legend: b batch, n seq_len, h num_heads, d head_dim.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import DTYPES, largest_excess
from benchmarks.peers import PEERS, make_peer
from benchmarks.pipelines import bare_kernel_calls, usual_pipeline
from longnet_zoo.ops import BACKENDS, DilatedPattern, dilated_attention
from longnet_zoo.ops.reference import dilated_attention_reference

__all__ = ["PASSES", "Contender", "Shape", "check_backend", "contenders_of", "passes_of"]

PASSES = ("forward", "forward+backward")
# FLOPs for an attended pair and channel: two products forward, five more backward.
FLOPS = {"forward": 4, "forward+backward": 14}
_DENSE = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ),
}
_CHECKED = DilatedPattern(segment_lengths=(32, 64, 128), dilation_rates=(1, 2, 4))
_CHECKED_LEN, _CHECKED_HEADS = 200, 4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], Any]
Kind = Literal["dilated", "dense", "usual", "bare", "peer"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One size: sequence, heads, dtype, device, pattern; causal, one sequence."""

    seq_len: int
    num_heads: int
    head_dim: int
    dtype: str
    device: torch.device
    pattern: DilatedPattern

    @property
    def pairs(self) -> int:
        """Attended pairs of all heads."""
        return self.pattern.attended_pairs(self.seq_len, self.num_heads, is_causal=True)

    @property
    def dense_len(self) -> int:
        """Length at which dense causal attention attends about as many pairs, on whole tiles."""
        length = math.sqrt(2 * self.pairs / self.num_heads)
        tile = 128 if length >= 1024 else 8
        return max(1, round(length / tile)) * tile

    def draw(self, count: int, seq_len: int, num_heads: int) -> tuple[Tensor, ...]:
        """Random tensors (1, seq_len, num_heads, d)."""
        shape = (1, seq_len, num_heads, self.head_dim)
        dtype = DTYPES[self.dtype][0]
        return tuple(torch.randn(shape, device=self.device, dtype=dtype) for _ in range(count))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to attend.

    Attributes:
        name: Shown in tables.
        kind: What it is.
        pairs: Attended pairs of all heads.
        make: Builds the functions to time, by pass; may raise, which is a reason not to run.
        check: Says what is wrong with its results, or None.
        facts: What else belongs into its cell.
    """

    name: str
    kind: Kind
    pairs: int
    make: Callable[[], dict[str, Run]]
    check: Callable[[], str | None] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)


def contenders_of(shape: Shape, backends: tuple[str, ...]) -> list[Contender]:
    """Every contender at a size; the tensors of one sequence length are shared."""
    pattern = shape.pattern
    tensors: list[tuple[Tensor, ...]] = []

    def shared() -> tuple[Tensor, ...]:
        if not tensors:
            tensors.append(shape.draw(4, shape.seq_len, shape.num_heads))
        return tensors[0]

    found = []
    for backend in backends or BACKENDS[1:]:
        attend = partial(_ours, backend=backend)
        found.append(
            Contender(
                name=f"dilated, {backend}",
                kind="dilated",
                pairs=shape.pairs,
                make=lambda attend=attend: passes_of(partial(attend, pattern=pattern), shared()),
                check=partial(check_backend, backend, shape),
                facts={"backend": backend},
            )
        )
    usual = Contender(
        name="usual pipeline",
        kind="usual",
        pairs=shape.pairs,
        make=lambda: passes_of(partial(usual_pipeline, pattern=pattern), shared()),
        # Its mixing weights are not differentiated, so its gradients are not those of the oracle.
        check=partial(_check, usual_pipeline, shape, has_grads=False),
    )
    bare = Contender(
        name="bare kernel calls",
        kind="bare",
        pairs=shape.pairs,
        make=lambda: _bare(shape, shared()),
    )
    return [*found, *_dense_contenders(shape), usual, bare, *_peer_contenders(shape, shared)]


def check_backend(backend: str, shape: Shape) -> str | None:
    """Says what is wrong with a backend's output or gradients at a small size, or None."""
    return _check(partial(_ours, backend=backend), shape, has_grads=True)


def passes_of(attend: Attend, tensors: tuple[Tensor, ...]) -> dict[str, Run]:
    """Forward, and forward with backward, on q, k, v and the gradient of the output."""
    *inputs, out_grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]

    @torch.no_grad()
    def forward() -> Tensor:
        return attend(*inputs)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, out_grad)

    return {"forward": forward, "forward+backward": forward_backward}


def _ours(q: Tensor, k: Tensor, v: Tensor, *, pattern: DilatedPattern, backend: str) -> Tensor:
    out: Tensor = dilated_attention(q, k, v, pattern, is_causal=True, backend=backend)
    return out


def _check(attend: Callable[..., Tensor], shape: Shape, *, has_grads: bool) -> str | None:
    """Compares with the float64 oracle at a small size."""
    *inputs, out_grad = shape.draw(4, _CHECKED_LEN, _CHECKED_HEADS)
    leaves = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attend(*leaves, pattern=_CHECKED)
    expected = dilated_attention_reference(*exact, _CHECKED, is_causal=True)
    problem = _excess("output", out, expected, shape.dtype)
    if problem or not has_grads:
        return problem
    grads = torch.autograd.grad(out, leaves, out_grad)
    right = torch.autograd.grad(expected, exact, out_grad.double())
    problems = map(_excess, ("dq", "dk", "dv"), grads, right, [shape.dtype] * 3)
    return next(filter(None, problems), None)


def _excess(name: str, found: Tensor, expected: Tensor, dtype: str) -> str | None:
    excess = largest_excess(found, expected, dtype)
    if excess <= 1:  # false for NaNs
        return None
    return f"wrong: {name} is off from the oracle by {excess:.3g} times the tolerance"


def _dense_contenders(shape: Shape) -> list[Contender]:
    seq_len = shape.dense_len
    pairs = shape.num_heads * seq_len * (seq_len + 1) // 2
    tensors: list[tuple[Tensor, ...]] = []

    def make(backend: SDPBackend) -> dict[str, Run]:
        if not tensors:
            drawn = shape.draw(4, seq_len, shape.num_heads)
            # Heads first in memory, which its kernels like best.
            tensors.append(tuple(x.transpose(1, 2).contiguous() for x in drawn))
        return passes_of(partial(_dense, backend=backend), tensors[0])

    return [
        Contender(
            name=f"dense, {backend.name.lower().removesuffix('_attention')}",
            kind="dense",
            pairs=pairs,
            make=partial(make, backend),
            check=partial(_check_dense, shape, backend),
            facts={"dense_len": seq_len},
        )
        for backend in _DENSE[shape.device.type]
    ]


def _dense(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    # PyTorch warns about each condition that a backend does not meet, then raises.
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _check_dense(shape: Shape, backend: SDPBackend) -> str | None:
    q, k, v = shape.draw(3, _CHECKED_LEN, _CHECKED_HEADS)
    out = _dense(*(x.transpose(1, 2) for x in (q, k, v)), backend=backend).transpose(1, 2)
    dense = DilatedPattern(segment_lengths=(_CHECKED_LEN,), dilation_rates=(1,))
    expected = dilated_attention_reference(
        q.double(), k.double(), v.double(), dense, is_causal=True
    )
    return _excess("output", out, expected, shape.dtype)


def _bare(shape: Shape, tensors: tuple[Tensor, ...]) -> dict[str, Run]:
    divides = all(
        shape.seq_len % length == length % rate == 0 for length, rate in shape.pattern.branches
    )
    if not divides:
        raise NotImplementedError(
            f"needs segments that divide seq_len={shape.seq_len}, and rates that divide segments"
        )
    forward, backward = bare_kernel_calls(*tensors, shape.pattern)

    def forward_backward() -> None:
        forward()
        backward()

    return {"forward": forward, "forward+backward": forward_backward}


def _peer_contenders(shape: Shape, shared: Callable[[], tuple[Tensor, ...]]) -> list[Contender]:
    def make(name: str) -> dict[str, Run]:
        tensors = shared()
        return passes_of(make_peer(name, shape.pattern, tensors[0]), tensors)

    def compare(name: str, facts: dict[str, Any]) -> None:
        facts["largest_difference"] = _difference(name, shape)

    found = []
    for name in PEERS:
        facts: dict[str, Any] = {}
        found.append(
            Contender(
                name=name,
                kind="peer",
                pairs=shape.pairs,
                make=partial(make, name),
                check=partial(compare, name, facts),
                facts=facts,
            )
        )
    return found


def _difference(name: str, shape: Shape) -> float:
    """Largest difference of a package from the paper's formula, at a length it can take."""
    q, k, v = shape.draw(3, 2 * _CHECKED.segment_lengths[-1], _CHECKED_HEADS)
    with torch.no_grad():
        found = make_peer(name, _CHECKED, q)(q, k, v).double()
    exact = (x.double() for x in (q, k, v))
    expected = dilated_attention_reference(*exact, _CHECKED, is_causal=True)
    return (found - expected).abs().max().item()
