"""Measures the largest tensor that anything makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operator returned, views aside."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.numel = max(self.numel, *made, 0)
        return out
