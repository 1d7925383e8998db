"""What holds for every call: parity with the oracle over drawn shapes, and no leaks."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from longnet_zoo.ops.reference import visible_keys
from tests.ops.draws import (
    BIASES,
    Call,
    assert_parity,
    calls,
    patterns,
    results,
    run,
)

MANY = settings(max_examples=60)


def test_uninitialised_memory_shows_itself():
    """Every test of the op relies on it: an output row that nobody writes is NaN."""
    assert torch.empty(5).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(4)).isnan().all()


@MANY
@given(calls())
def test_any_call_equals_the_oracle(call):
    for backend in (*call.backends, "auto"):
        assert_parity(call, backend)


@MANY
@given(calls(biases=BIASES[1:]))
def test_any_call_with_a_bias_equals_the_oracle(call):
    assert_parity(call)


@MANY
@given(calls(xpos=True))
def test_any_call_with_xpos_equals_the_oracle(call):
    for backend in call.backends:
        assert_parity(call, backend)


@MANY
@given(calls(biases=BIASES, xpos=True), st.booleans())
def test_any_call_in_float64_equals_the_oracle_to_ten_digits(call, with_lse_grad):
    assert_parity(call, dtype=torch.float64, with_lse_grad=with_lse_grad)


@settings(max_examples=30)
@given(calls(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_any_call_in_half_precision_stays_near_the_oracle(call, dtype):
    for backend in call.backends:
        assert_parity(call, backend, dtype)


@MANY
@given(calls(biases=(None, None, "table")), st.data())
def test_only_what_may_see_a_token_moves_with_it(call, data):
    """Bit by bit, per head, for every backend; causal: nothing before the token."""
    row = data.draw(st.integers(0, call.batch - 1))
    token = data.draw(st.integers(0, call.seq_len - 1))
    may_see = _may_see(call)[row, :, :, token].transpose(0, 1)
    if call.is_causal:
        assert not may_see[:token].any()
    for backend in call.backends:
        inputs = {name: x.detach() for name, x in call.inputs(torch.float32).items()}
        out, lse = run(call, inputs, backend=backend)

        other = {name: x.clone() for name, x in inputs.items()}
        for name in "qkv":
            other[name][row, token] += torch.linspace(1.0, 3.0, call.head_dim)
        moved_out, moved_lse = run(call, other, backend=backend)
        may_move = may_see.clone()
        may_move[token] = True
        assert torch.equal(moved_out[row][~may_move], out[row][~may_move])
        assert torch.equal(moved_lse[row][~may_move], lse[row][~may_move])
        others = torch.arange(call.batch) != row
        assert torch.equal(moved_out[others], out[others])

        other["q"], other["k"] = inputs["q"], inputs["k"]
        other["v"] = inputs["v"].clone()
        other["v"][row, token] += 1e4
        moved_out, moved_lse = run(call, other, backend=backend)
        assert torch.equal((moved_out != out)[row].any(-1), may_see)
        assert torch.equal(moved_lse, lse)


def _may_see(call: Call) -> torch.Tensor:
    """(batch, num_heads, query, key): whether the oracle counts the pair."""
    return (
        visible_keys(
            call.pattern,
            batch=call.batch,
            seq_len=call.seq_len,
            num_heads=call.num_heads,
            is_causal=call.is_causal,
            key_padding_mask=call.key_padding_mask(),
            cu_seqlens=call.cu_seqlens(),
        ).counts
        > 0
    )


@MANY
@given(calls(biases=(None, "table")), st.data())
def test_rows_that_see_nothing_are_zero_and_their_gradients_finite(call, data):
    lengths = call.segment_lengths
    rates = tuple(data.draw(st.integers(min(2, length), min(length, 9))) for length in lengths)
    call = dataclasses.replace(call, dilation_rates=rates)
    sees_nothing = ~_may_see(call).any(-1).transpose(1, 2)
    for backend in call.backends:
        got = results(call, call.inputs(torch.float32), backend=backend)
        assert got["out"][sees_nothing].eq(0).all()
        assert got["lse"][sees_nothing].isneginf().all()
        assert got["lse"][~sees_nothing].isfinite().all()
        assert got["d_q"][sees_nothing].eq(0).all()
        for name in ("out", "d_q", "d_k", "d_v"):
            assert got[name].isfinite().all()


@MANY
@given(patterns(), st.integers(1, 60), st.integers(1, 9), st.booleans(), st.booleans())
def test_a_pattern_counts_what_the_oracle_counts(branches, seq_len, num_heads, is_causal, is_block):
    call = Call(
        **branches,
        seq_len=seq_len,
        num_heads=num_heads,
        head_offset="block" if is_block else "modulo",
    )
    counts = visible_keys(
        call.pattern, batch=1, seq_len=seq_len, num_heads=num_heads, is_causal=is_causal
    ).counts[0]
    got = call.pattern.mask_counts(seq_len, num_heads, is_causal=is_causal)
    assert torch.equal(got, counts)
    pairs = call.pattern.attended_pairs(seq_len, num_heads, is_causal=is_causal)
    assert pairs == counts.sum().item()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_a_batch_equals_its_rows_one_by_one(backend, is_causal):
    call = Call(
        segment_lengths=(6, 15),
        dilation_rates=(1, 4),
        seq_len=34,
        batch=3,
        num_heads=6,
        num_kv_heads=3,
        is_causal=is_causal,
    )
    inputs = {name: x.detach() for name, x in call.inputs(torch.float32).items()}
    out, lse = run(call, inputs, backend=backend)
    for row in range(3):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        alone, alone_lse = run(dataclasses.replace(call, batch=1), one, backend=backend)
        torch.testing.assert_close(out[row : row + 1], alone)
        torch.testing.assert_close(lse[row : row + 1], alone_lse)
