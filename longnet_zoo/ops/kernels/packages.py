"""Optional packages that bring kernels: absent, broken or whole, found out when one is asked for.

A package built for another PyTorch or CUDA often fails only while it is imported, and with any of
a number of errors; such a machine still has other kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["OptionalPackage"]


@dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """What a kernel module needs beside PyTorch, named there as `PACKAGE`.

    Attributes:
        modules: Dotted names of the modules that must be there.
        install: Command that installs them.
        load: Imports them and returns the functions that the kernel calls.
    """

    modules: tuple[str, ...]
    install: str
    load: Callable[[], Any]

    def is_installed(self) -> bool:
        """Whether all modules can be found; no file of theirs is run."""
        return all(_is_found(module) for module in self.modules)

    def failure(self) -> str | None:
        """Says why the modules, which are there, cannot be loaded, or None."""
        return _failure(self.load)


@lru_cache
def _is_found(module: str) -> bool:
    # importlib.util.find_spec would import the parents of a module, which may be broken.
    parts = module.split(".")
    path: Sequence[str] | None = None
    for end in range(1, len(parts) + 1):
        spec = _spec(".".join(parts[:end]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _spec(module: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        # Finders may be of an older kind, or block a package by raising.
        find_spec = getattr(finder, "find_spec", lambda *_: None)
        try:
            spec: ModuleSpec | None = find_spec(module, path)
        except ImportError:
            return None
        if spec is not None:
            return spec
    return None


@lru_cache
def _failure(load: Callable[[], Any]) -> str | None:
    try:
        load()
    except Exception as error:  # ImportError, OSError, RuntimeError, AttributeError: all were seen
        return f"{type(error).__name__}: {error}"
    return None
