"""The op against the float64 oracle: output, log-sum-exp and each gradient by itself."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from tests.ops.draws import (
    FLOAT32,
    LAYOUTS,
    Call,
    assert_close,
    assert_parity,
    cotangents,
    oracle_results,
    results,
    sum_loss,
)

CALLS = {
    "paper_like": Call(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), seq_len=64),
    "nothing_divides": Call(
        segment_lengths=(5, 11, 23),
        dilation_rates=(1, 3, 7),
        seq_len=47,
        batch=2,
        num_heads=5,
        num_kv_heads=5,
        head_dim=6,
    ),
    "published_16384_6_and_more_in_small": Call(
        segment_lengths=(8, 16, 32, 64, 128),
        dilation_rates=(1, 2, 4, 6, 12),
        seq_len=101,
        num_heads=12,
        num_kv_heads=12,
        head_dim=5,
        seed=1,
    ),
    "one_token": Call(segment_lengths=(4, 9), dilation_rates=(1, 3), seq_len=1, batch=2),
    "shorter_than_every_segment": Call(
        segment_lengths=(16, 64), dilation_rates=(1, 4), seq_len=7, batch=3, head_dim=3
    ),
    "rates_above_the_number_of_heads": Call(
        segment_lengths=(6, 20), dilation_rates=(1, 11), seq_len=43, num_heads=2, num_kv_heads=2
    ),
    "no_branch_of_rate_one": Call(
        segment_lengths=(7, 19), dilation_rates=(2, 5), seq_len=41, num_heads=4, num_kv_heads=4
    ),
    "rate_equals_segment": Call(segment_lengths=(3, 7), dilation_rates=(3, 7), seq_len=29),
    "single_tokens_as_segments": Call(segment_lengths=(1, 6), dilation_rates=(1, 2), seq_len=13),
    "grouped_queries": Call(
        segment_lengths=(6, 13),
        dilation_rates=(1, 4),
        seq_len=31,
        batch=2,
        num_heads=6,
        num_kv_heads=2,
    ),
    "multi_query": Call(
        segment_lengths=(4, 10, 17),
        dilation_rates=(1, 3, 4),
        seq_len=37,
        num_heads=7,
        num_kv_heads=1,
    ),
    "tail_of_one_token": Call(
        segment_lengths=(8, 12), dilation_rates=(1, 2), seq_len=25, num_heads=4, num_kv_heads=4
    ),
    "heads_not_divisible_by_rate": Call(
        segment_lengths=(9, 18), dilation_rates=(1, 4), seq_len=40, num_heads=6, num_kv_heads=3
    ),
}
SWITCHES = [
    (head_offset, padded_keys, is_causal)
    for head_offset in ("modulo", "block")
    for padded_keys in ("ignore", "zero")
    for is_causal in (False, True)
]


def switched(call: Call, switches: tuple[str, str, bool]) -> Call:
    head_offset, padded_keys, is_causal = switches
    return dataclasses.replace(
        call, head_offset=head_offset, padded_keys=padded_keys, is_causal=is_causal
    )


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: f"{s[0]}-{s[1]}-causal={s[2]}")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_float32_equals_the_oracle(backend, name, switches):
    assert_parity(switched(CALLS[name], switches), backend)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: f"{s[0]}-{s[1]}-causal={s[2]}")
@pytest.mark.parametrize("name", CALLS)
def test_gradient_of_the_log_sum_exp_equals_the_oracle(name, switches):
    assert_parity(switched(CALLS[name], switches), with_lse_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["nothing_divides", "no_branch_of_rate_one", "grouped_queries"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_other_dtypes_equal_the_oracle(backend, name, is_causal, dtype):
    for padded_keys in ("ignore", "zero"):
        call = dataclasses.replace(CALLS[name], is_causal=is_causal, padded_keys=padded_keys)
        assert_parity(call, backend, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_memory_layout_does_not_matter(backend, is_causal, layout):
    for name in ("nothing_divides", "grouped_queries"):
        call = dataclasses.replace(CALLS[name], is_causal=is_causal, layout=layout)
        if layout != "plain":
            assert not call.inputs(torch.float32)["q"].is_contiguous()
        assert_parity(call, backend)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_keys_expanded_over_the_batch_equal_copies(backend):
    call = dataclasses.replace(CALLS["nothing_divides"], is_causal=True)
    inputs = call.inputs(torch.float32)
    inputs["k"] = inputs["k"].detach()[:1].expand(2, -1, -1, -1).requires_grad_()
    got, expected = results(call, inputs, backend=backend), oracle_results(call, inputs)
    for name, value in got.items():
        assert_close(value, expected[name], name, FLOAT32)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize(("seq_len", "segment_length"), [(1, 1), (13, 13), (29, 64)])
def test_one_branch_of_rate_one_is_dense_attention(seq_len, segment_length, backend, is_causal):
    q, k, v = torch.randn(3, 2, seq_len, 3, 8).unbind(0)
    pattern = DilatedPattern(segment_lengths=(segment_length,), dilation_rates=(1,))
    out = dilated_attention(q, k, v, pattern, is_causal=is_causal, backend=backend)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=is_causal
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, **FLOAT32)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [0.05, -0.4, 0.0, 0.9])
def test_scale_is_used(scale, is_causal):
    call = CALLS["nothing_divides"]
    assert_parity(dataclasses.replace(call, scale=scale, is_causal=is_causal))


@pytest.mark.parametrize(
    ("bias", "switches"),
    # Which rows the heads of a branch see has no part in how a bias is added.
    [(None, switches) for switches in SWITCHES]
    + [(bias, switches) for bias in ("dense", "table") for switches in SWITCHES[:4]],
    ids=str,
)
def test_gradcheck_in_float64(bias, switches):
    """Three branches, grouped queries; out and lse as outputs, bias and inputs as variables."""
    call = Call(
        segment_lengths=(2, 3, 7),
        dilation_rates=(1, 2, 3),
        seq_len=5,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        bias=bias,
    )
    call = switched(call, switches)
    inputs = call.inputs(torch.float64)

    def attend(q, k, v, bias=None):
        return dilated_attention(
            q,
            k,
            v,
            call.pattern,
            bias=call.as_bias(bias),
            is_causal=call.is_causal,
            return_lse=True,
        )

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))
    # Without a gradient into lse the fused kernels run their own backward.
    only_out = lambda *x: attend(*x)[0]  # noqa: E731
    assert torch.autograd.gradcheck(only_out, tuple(inputs.values()), fast_mode=True)


def test_return_lse_changes_nothing_else():
    inputs = CALLS["nothing_divides"].inputs(torch.float32)
    q, k, v = inputs.values()
    pattern = CALLS["nothing_divides"].pattern
    out, lse = dilated_attention(q, k, v, pattern, return_lse=True)
    alone = dilated_attention(q, k, v, pattern)
    assert torch.equal(out, alone)
    assert lse.shape == q.shape[:3]


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_each_gradient_can_be_asked_for_alone(wanted):
    call = CALLS["grouped_queries"]
    inputs = call.inputs(torch.float32)
    expected = oracle_results(call, inputs)[f"d_{wanted}"]
    for name, x in inputs.items():
        x.requires_grad_(name == wanted)
    out = dilated_attention(inputs["q"], inputs["k"], inputs["v"], call.pattern)
    factors = cotangents(call, torch.float32)
    (grad,) = torch.autograd.grad(sum_loss(out, None, factors), [inputs[wanted]])
    assert_close(grad, expected, wanted, FLOAT32)
