"""timm's Muon, which on a CPU orthogonalizes in float32.

timm iterates in bfloat16. CPUs without instructions for it (most laptops) then take six times as
long, which is more than the rest of a small model's step, and they round differently from those
that have them. timm 1.0.31 has no option for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from timm.optim import Muon as TimmMuon
from timm.optim import muon as timm_muon

__all__ = ["Muon"]


class Muon(TimmMuon):
    """Muon (Jordan et al. 2024), with the options of `timm.optim.Muon`."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a step; returns what the closure does."""
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        name = "zeropower_via_newtonschulz"
        in_float32 = partial(getattr(timm_muon, name), dtype=torch.float32)
        with mock.patch.object(timm_muon, name, in_float32):
            return super().step(closure)
