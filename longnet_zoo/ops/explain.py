"""What `dilated_attention` would run for a call, and why not the other kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .branches import ExtraBranch
from .dilated_attention import DistanceBias, checked_options
from .kernels import KERNELS, Call, choose_kernel, preferred, refusal_of
from .pattern import DilatedPattern

__all__ = ["BackendReport", "explain_backend"]


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """Kernels of a call; `print` it.

    Attributes:
        forward: Name of the kernel that runs the forward pass.
        backward: Name of the kernel that runs the backward pass.
        reasons: For every kernel, in the order of preference, what it runs or why it does not.
        source: Where the order of preference comes from.
    """

    forward: str
    backward: str
    reasons: dict[str, str]
    source: str

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [f"{name:<{width}}  {reason}" for name, reason in self.reasons.items()]
        return "\n".join([*lines, f"order: {self.source}"])


def explain_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Tensor | DistanceBias | None = None,
    xpos_scale_base: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    return_lse: bool = False,
    extra_branches: Sequence[ExtraBranch] = (),
) -> BackendReport:
    """Says which kernel `dilated_attention` would run, and why the others would not run.

    Takes the arguments of `dilated_attention`, refuses what it refuses, and attends nothing.

    Args:
        q: Queries, (batch, seq_len, num_heads, head_dim).
        k: Keys, (batch, seq_len, num_kv_heads, head_dim).
        v: Values, like k.
        pattern: Which keys a query sees. With None the report is about `extra_branches`.
        is_causal: Whether a query sees only the keys up to itself.
        scale: Factor on the dot products.
        bias: Added to the logits.
        xpos_scale_base: Base of the xPos decay.
        key_padding_mask: True at padding, (batch, seq_len).
        cu_seqlens: Boundaries of packed sequences, (num_sequences + 1,).
        dropout_p: Probability of dropping an attention weight.
        backend: `"auto"`, or a name of `ops.kernels.BACKENDS`.
        return_lse: Whether the LSE is returned; a gradient is then taken to flow in through it.
        extra_branches: Further branches of the same softmax.

    Returns:
        The kernels of both passes, and a reason for each of the others.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: As `dilated_attention` does.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4096, 8, 64).unbind(0)
        >>> print(explain_backend(q, k, v, DilatedPattern.geometric(512, 4096)))  # doctest: +SKIP
        sdpa       runs
        math       can serve, but comes later in the order
        cudnn      needs a CUDA device, got 'cpu'
        ...
    """
    options = checked_options(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        scale=scale,
        bias=bias,
        xpos_scale_base=xpos_scale_base,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        dropout_p=dropout_p,
        backend=backend,
        return_lse=return_lse,
        seed=None,
        extra_branches=extra_branches,
    )
    # Branches of tiles hide keys themselves.
    has_hidden_keys = pattern is not None and options.sequences(q)[1] is not None
    forward = options.call(q, has_hidden_keys=has_hidden_keys)
    backward = options.call(
        q, has_hidden_keys=has_hidden_keys, is_backward=True, has_lse_grad=return_lse
    )
    tiles = [replace(call, is_block=True, has_hidden_keys=False) for call in (forward, backward)]
    if extra_branches:
        for call in tiles:
            choose_kernel(backend, call)  # refuses what their branches would refuse
    return _report(backend, *(tiles if pattern is None else (forward, backward)))


def _report(backend: str, forward: Call, backward: Call) -> BackendReport:
    runs = [choose_kernel(backend, call).NAME for call in (forward, backward)]
    order, source = preferred(forward)
    if backward.is_backward and preferred(backward) != (order, source):
        source = f"forward {source}; backward {preferred(backward).source}"
    names = sorted(KERNELS, key=lambda name: order.index(name) if name in order else len(order))
    reasons = {name: _reason(name, runs, backend, forward, backward) for name in names}
    return BackendReport(forward=runs[0], backward=runs[1], reasons=reasons, source=source)


def _reason(name: str, runs: list[str], backend: str, forward: Call, backward: Call) -> str:
    texts = [
        "runs" if run == name else _why_not(name, backend, call)
        for run, call in zip(runs, (forward, backward), strict=True)
    ]
    if texts[0] == texts[1]:
        return texts[0]
    return f"forward: {texts[0]}; backward: {texts[1]}"


def _why_not(name: str, backend: str, call: Call) -> str:
    refusal = refusal_of(KERNELS[name], call)
    if refusal is not None:
        return refusal.reason
    if name not in preferred(call).order:
        return f"can serve, but only as backend={name!r} on this device"
    if backend != "auto" and refusal_of(KERNELS[backend], call) is None:
        return f"can serve, but backend={backend!r} is asked for"
    return "can serve, but comes later in the order"
