"""The block primitive: attention of query rows over key rows, with its log-sum-exp.

A kernel is a module with a `NAME`, a `supports(call)` that returns the reason why not (or None), a
`forward` and a `backward`; if it needs an optional package, that is its `PACKAGE`. Rows and keys of
a call are the same positions, so causal means that row i sees the keys up to i. All tensors are
(batch, rows, heads, head_dim), LSEs (batch, rows, heads); any strides, so long as head_dim is
contiguous. A kernel of packed sequences has `forward_packed` and `backward_packed` as well.
"""

from __future__ import annotations

from .call import Call
from .choice import BACKENDS, KERNELS, capability_of, choose_kernel, refusal_of
from .preference import preferred

__all__ = [
    "BACKENDS",
    "KERNELS",
    "Call",
    "capability_of",
    "choose_kernel",
    "preferred",
    "refusal_of",
]
