"""The whole joint softmax in Triton: NVIDIA and AMD GPUs, or Triton's interpreter on a CPU.

Unlike the other kernels this one is not given blocks: a launch serves all segments and heads of a
branch, reads strided rows where they lie, and merges the branches itself. `ops.fused_softmax`
plans the launches.
"""

from __future__ import annotations

from types import ModuleType

import torch

from .call import Call
from .packages import OptionalPackage

__all__ = ["NAME", "PACKAGE", "supports"]

NAME = "triton"


def _load() -> ModuleType:
    import triton

    from . import triton_parts  # noqa: F401 - an old Triton lacks what it imports

    if torch.cuda.is_available():
        # Builds the launcher, for which a bare machine may lack a C compiler.
        triton.runtime.driver.active.get_current_target()
    return triton


PACKAGE = OptionalPackage(modules=("triton",), install="pip install triton", load=_load)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 256


def supports(call: Call) -> str | None:
    """Says why a call cannot be served, or None."""
    if call.device_type != "cuda" and not (call.device_type == "cpu" and _is_interpreted()):
        return f"needs a CUDA device (or TRITON_INTERPRET=1, for tests), got {call.device_type!r}"
    if call.dtype not in _DTYPES:
        return f"does not support {call.dtype}"
    if call.head_dim > _MAX_HEAD_DIM:
        return f"needs a head_dim of at most {_MAX_HEAD_DIM}, got {call.head_dim}"
    if call.is_block:
        return "attends to whole sequences, not to blocks (extra_branches, several processes)"
    if call.has_dense_bias:
        return "does not support a bias by pairs of positions"
    if call.has_unnested_xpos:
        return "does not support xPos with segments that do not nest in the longest one"
    return call.below_capability((8, 0))


def _is_interpreted() -> bool:
    is_usable = PACKAGE.is_installed() and PACKAGE.failure() is None
    return is_usable and bool(_load().knobs.runtime.interpret)
