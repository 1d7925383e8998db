"""Ring attention equals one dense softmax, on several ranks and on one."""

import pytest
import torch
from torch.library import opcheck

from longnet_zoo.parallel.ring import ring_attention
from tests.parallel import ring_cases
from tests.parallel.dense import LAYOUTS, assert_near, dense, random_qkv, visible
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("case", ring_cases.CASES)
def test_ring_of_processes(tmp_path_factory, case, world_size):
    check_case(tmp_path_factory, ring_cases.__name__, world_size, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_lookback", [None, 5])
def test_one_process_attends_by_itself(layout, max_lookback):
    q, k, v, _ = random_qkv(seq_len=14)
    out, lse = dense(q, k, v, visible(2, 14, is_causal=True, max_lookback=max_lookback))
    actual = ring_attention(
        q, k, v, None, is_causal=True, max_lookback=max_lookback, layout=layout, return_lse=True
    )
    assert_near(actual[0], out, "out")
    assert_near(actual[1], lse, "lse")


def test_gradients_are_exact_in_float64():
    q, k, v = (x.double().requires_grad_() for x in random_qkv(batch=1, seq_len=5, head_dim=2)[:3])
    assert torch.autograd.gradcheck(
        lambda *qkv: ring_attention(*qkv, None, is_causal=True, max_lookback=3, return_lse=True),
        (q, k, v),
    )


def test_operator_is_registered_as_pytorch_wants():
    q, k, v, _ = random_qkv(seq_len=6)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    operands = []

    def recorded(*args):
        operands.append(args)
        return attend(*args)

    attend = torch.ops.longnet_zoo.ring_attention
    torch.ops.longnet_zoo.ring_attention = recorded
    try:
        ring_attention(*leaves, None, is_causal=True)
    finally:
        torch.ops.longnet_zoo.ring_attention = attend
    opcheck(attend, operands[0], test_utils=("test_schema", "test_faketensor"))


def test_a_compiler_gives_the_same_numbers():
    qkv = [x.requires_grad_() for x in random_qkv(seq_len=9)[:3]]

    def attend(q, k, v):
        return ring_attention(q * 1.0, k, v, None, is_causal=True)

    out = attend(*qkv)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*qkv)
    for x, y in zip(
        (compiled, *torch.autograd.grad(compiled.square().sum(), qkv)),
        (out, *torch.autograd.grad(out.square().sum(), qkv)),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_lookback": 0, "is_causal": True}, ValueError, "max_lookback=0 and is_causal=True"),
        ({"max_lookback": 3}, ValueError, "max_lookback=3 and is_causal=False"),
        ({"layout": "striped-ish"}, ValueError, "got 'striped-ish'"),
        ({"layout": "zigzag"}, ValueError, "even number of rows on each rank, got 7"),
        ({"bias": torch.zeros(1, 1, 7, 7)}, NotImplementedError, r"shape \(1, 1, 7, 7\)"),
        ({"xpos_scale_base": 1e-2}, ValueError, r"scale_base=0.01 overflows"),
        ({"dropout_p": 1.0}, ValueError, "got 1.0"),
        ({"backend": "triton"}, NotImplementedError, "triton"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, ValueError, r"got \[0, 9\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 4], dtype=torch.int32)}, ValueError, r"\[0, 4, 4\]"),
        ({"key_padding_mask": torch.zeros(1, 6, dtype=torch.bool)}, ValueError, r"got \(1, 6\)"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    q, k, v, _ = random_qkv(seq_len=7, batch=1)
    with pytest.raises(error, match=message):
        ring_attention(q, k, v, None, **options)
