"""Which kernel runs a call: what each one supports, then the table of preferences."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch

from . import cudnn, efficient, flash2, flash3, flash4, math, sdpa, triton
from .call import Call
from .packages import OptionalPackage
from .preference import preferred

__all__ = ["BACKENDS", "KERNELS", "Refusal", "capability_of", "choose_kernel", "refusal_of"]

KERNELS: dict[str, ModuleType] = {
    kernel.NAME: kernel
    for kernel in (
        sdpa,
        cudnn,
        efficient,
        flash2,
        flash3,
        flash4,
        triton,
        math,
    )
}
BACKENDS = ("auto", *KERNELS)


class Refusal(NamedTuple):
    """Why a kernel cannot run a call: by itself, or for want of a package."""

    kind: Literal["unsupported", "absent", "broken"]
    reason: str


def choose_kernel(backend: str, call: Call) -> ModuleType:
    """Picks the kernel of a call.

    Args:
        backend: A name in `BACKENDS`; `"auto"` takes the first of the table of preferences that
            serves the call.
        call: What is asked for. A gradient through the LSE, known only when the forward has run,
            goes to what `"auto"` takes if the named backend does not serve it.

    Raises:
        NotImplementedError: If the named backend does not support the call, with the reason.
        RuntimeError: If its package is absent or broken, with the command that installs it.
    """
    if backend == "auto":
        return _first_that_serves(call)
    kernel = KERNELS[backend]
    refusal = refusal_of(kernel, replace(call, has_lse_grad=False))
    if refusal is None:
        return kernel if refusal_of(kernel, call) is None else _first_that_serves(call)
    error = NotImplementedError if refusal.kind == "unsupported" else RuntimeError
    other = _first_that_serves(call, is_silent=True).NAME
    raise error(
        f"backend {backend!r} {refusal.reason}. Use backend='auto', which takes {other!r} here."
    )


def refusal_of(kernel: ModuleType, call: Call) -> Refusal | None:
    """Says why a kernel cannot run a call, or None; its package is looked for last."""
    reason: str | None = kernel.supports(call)
    if reason is not None:
        return Refusal("unsupported", reason)
    package: OptionalPackage | None = getattr(kernel, "PACKAGE", None)
    if package is None:
        return None
    if not package.is_installed():
        return Refusal("absent", f"is not installed: {package.install}")
    failure = package.failure()
    if failure is not None:
        return Refusal("broken", f"is installed but broken ({failure}): {package.install}")
    return None


def _first_that_serves(call: Call, *, is_silent: bool = False) -> ModuleType:
    for name in preferred(call).order:
        if name in KERNELS:
            refusal = refusal_of(KERNELS[name], call)
            if refusal is None:
                return KERNELS[name]
            if refusal.kind == "broken" and not is_silent:
                _warn_once(f"backend {name!r} {refusal.reason}. Another one is used meanwhile.")
    return math


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@lru_cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)
