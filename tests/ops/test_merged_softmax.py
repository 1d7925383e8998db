"""A kernel of plain attention whose branches Triton merges, as on a GPU, against the oracle."""

import dataclasses

import pytest
import torch

from longnet_zoo.ops import custom_op
from longnet_zoo.ops.joint_softmax import JointSoftmax
from longnet_zoo.ops.merged_softmax import MergedSoftmax
from tests.ops.draws import Call, assert_parity
from tests.ops.triton_device import DEVICE, HAS_GPU, MARKS

pytestmark = MARKS  # pytest.mark.gpu, on a GPU
# No kernel of plain attention has float32 on every GPU but this one.
KERNEL = "efficient" if HAS_GPU else "sdpa"

CALL = Call(
    segment_lengths=(12, 36),
    dilation_rates=(1, 3),
    seq_len=41,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    device=DEVICE,
)


def changed(**changes):
    return dataclasses.replace(CALL, **changes)


CALLS = {
    "causal": changed(is_causal=True),
    "block_offsets_zero_keys": changed(head_offset="block", padded_keys="zero"),
    "right_padding": changed(batch=3, seq_len=29, padding="right"),
    "equal_rows": changed(batch=2, seq_len=26, is_causal=True),
    "documents": changed(documents=(1, 2, 2, 30)),
    "nested_xpos": changed(segment_lengths=(18, 36), xpos_scale_base=64.0),
    "no_branch_of_rate_one": changed(dilation_rates=(2, 5)),
    "two_branches_of_rate_one": changed(dilation_rates=(1, 1)),
    "rate_above_heads": changed(segment_lengths=(8, 40), dilation_rates=(1, 11)),
    "nothing_but_padding": changed(padding="one_row_all"),
    "one_token": changed(seq_len=1),
}
OTHERS = {
    "grouped_queries": changed(num_kv_heads=2),
    "hidden_keys": changed(padding="left"),
    "segments_of_their_own_xpos": changed(segment_lengths=(12, 35), xpos_scale_base=64.0),
}


@pytest.fixture
def solvers(monkeypatch):
    """Lets Triton merge on a CPU too; returns the solvers that were taken."""
    monkeypatch.setattr(custom_op, "can_merge", lambda _: True)
    taken = []
    solver = custom_op.Options.solver

    def recorded(self, *arguments, **options):
        taken.append(solver(self, *arguments, **options))
        return taken[-1]

    monkeypatch.setattr(custom_op.Options, "solver", recorded)
    return taken


@pytest.mark.parametrize("name", CALLS)
def test_parity(name, solvers):
    seq_len = sum(CALLS[name].documents) or CALLS[name].seq_len
    assert_parity(dataclasses.replace(CALLS[name], seq_len=seq_len), KERNEL)
    assert solvers == [MergedSoftmax, MergedSoftmax]


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_does_not_serve_is_summed_up_block_by_block(name, solvers):
    assert_parity(OTHERS[name])
    assert solvers == [JointSoftmax, JointSoftmax]


def test_partials_keep_the_dtype_of_the_kernel(solvers):
    assert_parity(CALLS["causal"], "sdpa", torch.bfloat16)
    assert solvers == [MergedSoftmax, MergedSoftmax]


def test_plain_products_are_summed_up_block_by_block(solvers):
    assert_parity(CALLS["causal"], "math")
    assert solvers == [JointSoftmax, JointSoftmax]


@pytest.mark.skipif(HAS_GPU, reason="a GPU merges")
def test_a_cpu_does_not_merge():
    assert not custom_op.can_merge(
        custom_op.Call(device_type="cpu", dtype=torch.float32, head_dim=8)
    )
