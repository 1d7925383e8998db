"""Checks of further branches: that they fit a call, and that it asks for what they serve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .arguments import is_negative
from .branches import BigBirdBlocks, BlockSparse, ExtraBranch, HashBuckets, TokenSubset

__all__ = ["check_branch_types", "check_extra_branches"]


def check_branch_types(branches: object, scale: object) -> None:
    """Checks that further branches come as a tuple, which can be read twice, and the scale."""
    if not isinstance(branches, (tuple, list)):
        raise TypeError(
            f"extra_branches must be a tuple of branches, got {type(branches).__name__}. For a "
            "single one write (branch,)."
        )
    if branches and is_negative(scale):
        raise NotImplementedError(
            f"extra_branches need a positive scale, got {scale}. Multiply q by it."
        )


def check_extra_branches(
    q: Tensor,
    branches: Sequence[ExtraBranch],
    *,
    bias: object,
    xpos_scale_base: float | None,
    dropout_p: float,
) -> None:
    """Checks that branches fit the call, and that it asks for nothing that they do not serve."""
    for name, is_asked, cure in (
        ("bias", bias is not None, "Use rotary positions (apply_rotary)"),
        ("xpos_scale_base", xpos_scale_base is not None, "Use rotary positions without decay"),
        ("dropout_p", dropout_p != 0.0, "Drop out elsewhere"),
    ):
        if is_asked:
            raise NotImplementedError(
                f"extra_branches do not support {name}, got one with {len(branches)} of them. "
                f"{cure}, or leave extra_branches out."
            )
    for branch in branches:
        if isinstance(branch, BlockSparse):
            _check_block_mask(branch, q)
        elif isinstance(branch, TokenSubset):
            for name, mask in (("queries", branch.queries), ("keys", branch.keys)):
                if mask is not None:
                    _check_subset(name, mask, q)
        elif not isinstance(branch, (BigBirdBlocks, HashBuckets)):
            raise TypeError(
                "extra_branches must be BlockSparse, BigBirdBlocks, HashBuckets or TokenSubset, "
                f"got {type(branch).__name__}."
            )


def _check_block_mask(branch: BlockSparse, q: Tensor) -> None:
    if branch.block_mask.device != q.device:
        raise ValueError(
            f"block_mask must be on the device of q, got {branch.block_mask.device} and {q.device}."
        )
    branch.check_fits(q.shape[1], q.shape[2])


def _check_subset(name: str, mask: Tensor, q: Tensor) -> None:
    if mask.shape != q.shape[:3]:
        raise ValueError(
            f"{name} of a TokenSubset must be (batch, seq_len, num_heads) = {tuple(q.shape[:3])}, "
            f"got {tuple(mask.shape)}."
        )
    if mask.device != q.device:
        raise ValueError(
            f"{name} of a TokenSubset must be on the device of q, got {mask.device} and {q.device}."
        )
