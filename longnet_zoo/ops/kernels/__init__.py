"""The block primitive: attention of query rows over key rows, with its log-sum-exp.

A kernel is a module with a `NAME`, a `supports(call)` that returns the reason why not (or None), a
`forward` and a `backward`. Rows and keys of a call are the same positions, so causal means that row
i sees the keys up to i. All tensors are (batch, rows, heads, head_dim), LSEs (batch, rows, heads);
any strides, so long as head_dim is contiguous.
"""

from __future__ import annotations

from types import ModuleType

from . import cudnn, efficient, math, sdpa
from .call import Call

__all__ = ["BACKENDS", "Call", "choose_kernel"]

_KERNELS: tuple[ModuleType, ...] = (sdpa, cudnn, efficient, math)
BACKENDS = ("auto", *(kernel.NAME for kernel in _KERNELS))


def choose_kernel(backend: str, call: Call) -> ModuleType:
    """Picks the kernel of a call.

    Args:
        backend: A name in `BACKENDS`; `"auto"` takes the fastest kernel that supports the call.
        call: What is asked for.

    Raises:
        NotImplementedError: If the named backend does not support the call, with the reason.
    """
    reasons = []
    for kernel in _KERNELS:
        if backend in ("auto", kernel.NAME):
            reason = kernel.supports(call)
            if reason is None:
                return kernel
            reasons.append(f"backend {kernel.NAME!r} {reason}")
    raise NotImplementedError(f"{'; '.join(reasons)}. Use backend='auto'.")
