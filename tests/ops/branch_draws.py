"""Awkward calls with further branches as small values; see `draws.py`."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from longnet_zoo.ops.branches import (
    BigBirdBlocks,
    BlockSparse,
    ExtraBranch,
    HashBuckets,
    TokenSubset,
)
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.reference import dilated_attention_reference

from .draws import TOLERANCES, Call, assert_close, calls, cotangents, sum_loss

KINDS = ("blocks", "blocks_by_head", "big_bird", "hashes", "subset")


@dataclass(frozen=True, kw_only=True)
class BranchedCall:
    """A call of `draws.py` with further branches, or with these alone."""

    call: Call
    kinds: tuple[str, ...]
    has_pattern: bool = True
    block_size: int = 5

    def branches(self, *, for_op: bool = True) -> tuple[ExtraBranch, ...]:
        return tuple(
            self._branch(kind, number, for_op=for_op) for number, kind in enumerate(self.kinds)
        )

    def _branch(self, kind: str, number: int, *, for_op: bool) -> ExtraBranch:
        call = self.call
        generator = torch.Generator().manual_seed(call.seed + number)

        def draw(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) < 0.5).to(call.device)

        if kind == "big_bird":
            branch = BigBirdBlocks(block_size=self.block_size, seed=call.seed + number)
            # The oracle knows masks only; the op makes them for the length of the call.
            return branch if for_op else branch.for_length(call.seq_len, call.device)
        if kind == "hashes":
            return HashBuckets(num_buckets=4, num_rounds=2, seed=call.seed + number)
        if kind == "subset":
            shape = (call.batch, call.seq_len, call.num_heads)
            return TokenSubset(queries=draw(*shape), keys=draw(*shape))
        heads = (call.num_heads,) if kind == "blocks_by_head" else ()
        num_blocks = -(-call.seq_len // self.block_size) + number
        mask = draw(*heads, num_blocks, num_blocks)
        return BlockSparse(block_mask=mask, block_size=self.block_size)


@st.composite
def branched_calls(draw) -> BranchedCall:
    """Calls of every awkward shape, with one to three further branches."""
    has_pattern = draw(st.booleans())
    call = draw(calls())
    return BranchedCall(
        # Without a pattern there is nothing to pad.
        call=call if has_pattern else replace(call, padded_keys="ignore"),
        kinds=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))),
        has_pattern=has_pattern,
        block_size=draw(st.integers(1, 12)),
    )


def results(
    branched: BranchedCall,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    attend=dilated_attention,
    **more,
) -> dict[str, Tensor]:
    """out, lse and the gradient of each input, of a loss of both outputs in a call of `dtype`."""
    call = branched.call
    out, lse = attend(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        call.pattern if branched.has_pattern else None,
        return_lse=True,
        extra_branches=branched.branches(for_op=attend is dilated_attention),
        **call.options(),
        **more,
    )
    loss = sum_loss(out, lse, cotangents(call, dtype))
    grads = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def assert_branched_parity(
    branched: BranchedCall, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> None:
    """Compares out, lse and every gradient, each by itself, with the oracle."""
    inputs = branched.call.inputs(dtype)
    got = results(branched, inputs, dtype, backend=backend)
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = results(branched, leaves, dtype, attend=dilated_attention_reference)
    assert got["out"].dtype == dtype
    assert got["lse"].dtype == torch.promote_types(dtype, torch.float32)
    for name, value in got.items():
        assert_close(value, expected[name], name, TOLERANCES[dtype])
