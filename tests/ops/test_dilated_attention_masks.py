"""Padding and packing: real tokens never notice what shares their tensor."""

import dataclasses

import pytest
import torch

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from tests.ops.draws import FLOAT32, Call, assert_close, cotangents, results, run, sum_loss

LENGTHS = (17, 1, 0, 6, 23, 6)
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "math"])
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])
PADDED_KEYS = pytest.mark.parametrize("padded_keys", ["ignore", "zero"])


def padded_call(**changes) -> Call:
    """Six sequences of the LENGTHS above in rows of 23."""
    call = Call(
        segment_lengths=(5, 9, 16),
        dilation_rates=(1, 3, 4),
        seq_len=max(LENGTHS),
        batch=len(LENGTHS),
        num_heads=6,
        num_kv_heads=3,
    )
    return dataclasses.replace(call, **changes)


def right_mask() -> torch.Tensor:
    return torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]


def attend(call, inputs, backend="auto", **more):
    return dilated_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        call.pattern,
        is_causal=call.is_causal,
        backend=backend,
        return_lse=True,
        **more,
    )


def one_by_one(call, inputs, backend):
    """(row, length, outputs and gradients) of each sequence that has a token, alone."""
    factors = cotangents(call, torch.float32)
    for row, length in enumerate(LENGTHS):
        if length:
            inside = (slice(row, row + 1), slice(length))
            alone = {name: x[inside].detach().requires_grad_() for name, x in inputs.items()}
            out, lse = attend(call, alone, backend)
            loss = sum_loss(out, None, (factors[0][inside], factors[1][inside]))
            grads = torch.autograd.grad(loss, list(alone.values()))
            yield row, length, (out, lse, *grads)


@BACKENDS
@CAUSAL
@PADDED_KEYS
def test_a_right_padded_batch_equals_its_sequences_one_by_one(padded_keys, is_causal, backend):
    call = padded_call(padded_keys=padded_keys, is_causal=is_causal)
    inputs = call.inputs(torch.float32)
    out, lse = attend(call, inputs, backend, key_padding_mask=right_mask())
    loss = sum_loss(out, None, cotangents(call, torch.float32))
    grads = torch.autograd.grad(loss, list(inputs.values()))
    num_compared = 0
    for row, length, expected in one_by_one(call, inputs, backend):
        for got, value in zip((out, lse, *grads), expected, strict=True):
            torch.testing.assert_close(got[row : row + 1, :length], value, **FLOAT32)
            num_compared += 1
    assert num_compared == 5 * 5


@BACKENDS
@CAUSAL
@PADDED_KEYS
def test_a_packed_row_equals_its_sequences_one_by_one(padded_keys, is_causal, backend):
    call = padded_call(padded_keys=padded_keys, is_causal=is_causal)
    inputs = call.inputs(torch.float32)
    is_real = ~right_mask()
    packed = {name: x[is_real][None].detach().requires_grad_() for name, x in inputs.items()}
    bounds = torch.tensor([0, *(length for length in LENGTHS if length)]).cumsum(0)
    out, lse = attend(call, packed, backend, cu_seqlens=bounds.to(torch.int32))
    factors = [factor[is_real][None] for factor in cotangents(call, torch.float32)]
    grads = torch.autograd.grad(sum_loss(out, None, factors), list(packed.values()))
    start = 0
    for _, length, expected in one_by_one(call, inputs, backend):
        for got, value in zip((out, lse, *grads), expected, strict=True):
            torch.testing.assert_close(got[:, start : start + length], value, **FLOAT32)
        start += length
    assert start == sum(LENGTHS)


@pytest.mark.parametrize("bias", [None, "dense", "table"])
@pytest.mark.parametrize("padding", ["right", "left", "random", "one_row_all"])
@CAUSAL
def test_what_stands_in_padding_reaches_nothing(is_causal, padding, bias):
    call = padded_call(is_causal=is_causal, padding=padding, bias=bias)
    mask = call.key_padding_mask()
    assert mask.any()
    for backend in call.backends:
        inputs = call.inputs(torch.float32)
        before = results(call, inputs, backend=backend)
        changed = {name: x.detach().clone() for name, x in inputs.items()}
        for name in "qkv":
            changed[name][mask] = 1e4 * torch.randn_like(changed[name][mask])
            changed[name].requires_grad_()
        after = results(call, {**inputs, **changed, **bias_of(inputs)}, backend=backend)
        for name, value in before.items():
            # Rows of one kernel call never mix, so not a bit moves.
            assert torch.equal(after[name], value), name


def bias_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"bias": inputs["bias"]} if "bias" in inputs else {}


@pytest.mark.parametrize("padding", ["right", "left", "random", "one_row_all"])
@CAUSAL
def test_padded_rows_are_zero_and_get_no_gradient(is_causal, padding):
    call = padded_call(is_causal=is_causal, padding=padding)
    mask = call.key_padding_mask()
    for backend in call.backends:
        got = results(call, call.inputs(torch.float32), backend=backend)
        assert got["lse"][mask].isneginf().all()
        for name in ("out", "d_q", "d_k", "d_v"):
            assert got[name].isfinite().all()
            assert got[name][mask].eq(0).all()
            assert got[name][~mask].ne(0).any()


@CAUSAL
@pytest.mark.parametrize("num_padding", [1, 4, 9])
def test_left_padding_keeps_positions(num_padding, is_causal):
    """Segments start where the row starts: the first holds fewer real tokens."""
    q, k, v = torch.randn(3, 1, 14, 2, 4).unbind(0)
    mask = (torch.arange(14) < num_padding)[None]
    pattern = DilatedPattern(segment_lengths=(5,), dilation_rates=(1,))
    out = dilated_attention(q, k, v, pattern, is_causal=is_causal, key_padding_mask=mask)
    dense = DilatedPattern(segment_lengths=(14,), dilation_rates=(1,))
    for start, stop in ((0, 5), (5, 10), (10, 14)):
        real = slice(max(start, num_padding), stop)
        if real.start < stop:
            alone = dilated_attention(
                q[:, real], k[:, real], v[:, real], dense, is_causal=is_causal
            )
            torch.testing.assert_close(out[:, real], alone, **FLOAT32)
    assert out[:, :num_padding].eq(0).all()


@BACKENDS
@CAUSAL
def test_a_mask_without_padding_changes_nothing(is_causal, backend):
    call = padded_call(is_causal=is_causal)
    inputs = call.inputs(torch.float32)
    out, lse = attend(call, inputs, backend)
    mask = torch.zeros(call.batch, call.seq_len, dtype=torch.bool)
    masked_out, masked_lse = attend(call, inputs, backend, key_padding_mask=mask)
    assert torch.equal(masked_out, out)
    assert torch.equal(masked_lse, lse)


@BACKENDS
@CAUSAL
def test_one_packed_sequence_changes_nothing(is_causal, backend):
    call = padded_call(batch=1, is_causal=is_causal)
    inputs = call.inputs(torch.float32)
    out, lse = attend(call, inputs, backend)
    bounds = torch.tensor([0, call.seq_len], dtype=torch.int32)
    packed_out, packed_lse = attend(call, inputs, backend, cu_seqlens=bounds)
    assert torch.equal(packed_out, out)
    assert torch.equal(packed_lse, lse)


@BACKENDS
@CAUSAL
def test_documents_of_a_pack_do_not_see_each_other(is_causal, backend):
    documents = (4, 1, 7, 1, 11)
    call = padded_call(batch=1, seq_len=sum(documents), documents=documents, is_causal=is_causal)
    inputs = {name: x.detach() for name, x in call.inputs(torch.float32).items()}
    out, _ = run(call, inputs, backend=backend)
    inside = slice(5, 12)
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, inside] += 3.0
    moved, _ = run(call, changed, backend=backend)
    assert (moved[:, inside] != out[:, inside]).any()
    assert torch.equal(moved[:, :5], out[:, :5])
    assert torch.equal(moved[:, 12:], out[:, 12:])


@BACKENDS
def test_a_document_of_one_token_returns_its_value(backend):
    q, k, v = torch.randn(3, 1, 5, 2, 4).unbind(0)
    bounds = torch.arange(6, dtype=torch.int32)
    pattern = DilatedPattern(segment_lengths=(2, 4), dilation_rates=(1, 1))
    out = dilated_attention(q, k, v, pattern, cu_seqlens=bounds, backend=backend)
    torch.testing.assert_close(out, v, **FLOAT32)


@pytest.mark.parametrize("bias", ["dense", "dense_shared", "table"])
@CAUSAL
def test_a_bias_in_a_pack_is_that_of_each_document(is_causal, bias):
    """Dense: its block on the diagonal; by distance: the same table for all."""
    documents = (4, 4, 1, 9)
    call = padded_call(
        batch=1, seq_len=sum(documents), documents=documents, is_causal=is_causal, bias=bias
    )
    inputs = {name: x.detach() for name, x in call.inputs(torch.float32).items()}
    out, lse = run(call, inputs)
    start = 0
    for length in documents:
        inside = slice(start, start + length)
        alone = {name: inputs[name][:, inside] for name in "qkv"}
        own_bias = call.as_bias(inputs["bias"])
        if bias.startswith("dense"):
            own_bias = own_bias[..., inside, inside]
        own_out, own_lse = attend(call, alone, bias=own_bias)
        assert_close(out[:, inside], own_out.double(), "out", FLOAT32)
        assert_close(lse[:, inside], own_lse.double(), "lse", FLOAT32)
        start += length


@CAUSAL
@pytest.mark.parametrize("is_right", [True, False])
def test_nan_in_padding_stays_there(is_causal, is_right):
    pattern = DilatedPattern(segment_lengths=(4, 12), dilation_rates=(1, 3))
    mask = torch.arange(12) >= 8 if is_right else torch.arange(12) % 5 == 0
    inputs = [torch.randn(1, 12, 2, 4) for _ in range(4)]
    results = []
    for fill in (0.0, torch.nan):
        q, k, v, out_grad = (x.masked_fill(mask[None, :, None, None], fill) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*leaves, pattern, is_causal=is_causal, key_padding_mask=mask[None])
        results.append((out, *torch.autograd.grad(out, leaves, out_grad)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert poisoned[:, mask].eq(0).all()
