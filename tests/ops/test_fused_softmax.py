"""The Triton kernels against the oracle: on the GPU if there is one, else by Triton's interpreter.

The interpreter runs one programme at a time, slowly: few calls, each with several awkward features.
"""

import dataclasses

import pytest
import torch

from longnet_zoo.ops import fused_softmax
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference
from tests.ops.draws import Call, assert_parity
from tests.ops.triton_device import DEVICE, MARKS

pytestmark = MARKS  # pytest.mark.gpu, on a GPU

# Two tiles of 32 rows in the longer segments, several heads to an offset, and tails everywhere.
CALL = Call(
    segment_lengths=(12, 36),
    dilation_rates=(1, 3),
    seq_len=41,
    num_heads=2,
    num_kv_heads=1,
    head_dim=5,
    device=DEVICE,
)


def call(**changes):
    return dataclasses.replace(CALL, **changes)


CALLS = {
    "causal": call(is_causal=True),
    "long_segments": call(
        segment_lengths=(43, 53), dilation_rates=(1, 2), seq_len=53, is_causal=True
    ),
    "block_offsets_zero_keys": call(head_offset="block", padded_keys="zero", num_heads=3),
    "zero_keys_with_right_padding": call(batch=2, padding="right", padded_keys="zero"),
    "right_padding": call(batch=2, padding="right", is_causal=True),
    "left_padding": call(batch=2, padding="left"),
    "random_padding": call(batch=2, padding="random", is_causal=True),
    "one_row_all_padding": call(batch=2, padding="one_row_all"),
    "nothing_but_padding": call(padding="one_row_all"),
    "documents_of_very_different_lengths": call(documents=(1, 2, 37, 10), seq_len=50),
    "nested_xpos": call(segment_lengths=(18, 36), head_dim=6, xpos_scale_base=64.0),
    "no_branch_of_rate_one": call(dilation_rates=(2, 5)),
    "two_branches_of_rate_one": call(dilation_rates=(1, 1)),
    "no_other_branch": call(segment_lengths=(20,), dilation_rates=(1,)),
    "rate_above_heads": call(segment_lengths=(8, 40), dilation_rates=(1, 11)),
    "one_token": call(seq_len=1),
    "slices_of_a_joint_projection": call(layout="packed", num_heads=4, num_kv_heads=2, seq_len=23),
    "head_dim_above_a_tile": call(head_dim=36, seq_len=29),
}
BIASED = {
    "table": call(bias="table", seq_len=43),
    "causal_table_over_several_bands": call(
        bias="table", is_causal=True, segment_lengths=(40, 43), dilation_rates=(1, 1), seq_len=43
    ),
    "alibi_with_right_padding": call(bias="alibi", batch=2, padding="right", seq_len=23),
    "table_with_random_padding": call(bias="table", padding="random", seq_len=23),
    "table_and_nothing_but_padding": call(bias="table", padding="one_row_all", seq_len=5),
    "table_without_rate_one": call(bias="table", dilation_rates=(2, 3), seq_len=23),
}


@pytest.fixture
def _one_programme_per_band(monkeypatch):
    """Keeps the interpreter from running a thousand of them."""
    monkeypatch.setattr(fused_softmax, "_BAND_PROGRAMMES", 1)


@pytest.mark.parametrize("name", CALLS)
def test_parity(name):
    assert_parity(CALLS[name], "triton")


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.usefixtures("_one_programme_per_band")
def test_parity_with_a_bias_by_distance(name):
    assert_parity(BIASED[name], "triton")


def test_shares_of_a_band_add_up(monkeypatch):
    monkeypatch.setattr(fused_softmax, "_BAND_PROGRAMMES", 6)
    assert_parity(BIASED["table_with_random_padding"], "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_types(dtype):
    assert_parity(CALLS["causal"], "triton", dtype)


def test_a_gradient_through_the_lse():
    assert_parity(CALLS["causal"], "triton", with_lse_grad=True)


def test_heads_in_passes_give_the_same(monkeypatch):
    monkeypatch.setattr(fused_softmax, "_PASS_BYTES", 1)
    assert_parity(call(num_heads=4, num_kv_heads=2, seq_len=29), "triton")


def test_strided_cotangents():
    inputs = CALLS["causal"].inputs(torch.float32)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    options = {"is_causal": True}
    factors = torch.randn(1, 5, 2, 41, device=DEVICE).transpose(1, 3)
    out = dilated_attention(q, k, v, CALL.pattern, backend="triton", **options)
    expected = dilated_attention_reference(q, k, v, CALL.pattern, **options)
    found = torch.autograd.grad(out, (q, k, v), factors)
    wanted = torch.autograd.grad(expected, (q, k, v), factors.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)


def dropped(q, k, v, pattern, seed=5, **options):
    torch.manual_seed(seed)
    return dilated_attention(q, k, v, pattern, dropout_p=0.4, backend="triton", **options)


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_scales_what_it_keeps_and_has_the_gradient_of_what_it_computed(is_causal):
    """With one-hot values the output is the weights, from which the kept ones are read."""
    pattern = DilatedPattern(segment_lengths=(16,), dilation_rates=(1,))
    q, k = (torch.randn(2, 32, 2, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    one_hot = torch.eye(16, device=DEVICE).repeat(2, 1)[None, :, None].expand(2, -1, 2, -1)
    weights = dropped(q, k, one_hot, pattern, is_causal=is_causal)
    exact = dilated_attention_reference(q, k, one_hot, pattern, is_causal=is_causal).float()
    is_kept = weights.detach() != 0
    torch.testing.assert_close(weights[is_kept], exact[is_kept] / 0.6)
    share = (is_kept.sum() / (exact != 0).sum()).item()
    assert share == pytest.approx(0.6, abs=0.05)
    # Neither the batch rows, the segments nor the heads share their draws.
    for axis, size in ((0, 1), (1, 16), (2, 1)):
        first, second = is_kept.narrow(axis, 0, size), is_kept.narrow(axis, size, size)
        assert not torch.equal(first, second)

    v, factors = (torch.randn(2, 32, 2, 16, device=DEVICE) for _ in range(2))
    v.requires_grad_()
    found = torch.autograd.grad(dropped(q, k, v, pattern, is_causal=is_causal), (q, k, v), factors)
    logits = torch.einsum("bsqhd,bskhd->bshqk", *(x.view(2, 2, 16, 2, 16) for x in (q, k))) / 4
    if is_causal:
        ahead = torch.ones(16, 16, dtype=torch.bool, device=DEVICE).triu(1)
        logits = logits.masked_fill(ahead, float("-inf"))
    factor = is_kept.view(2, 2, 16, 2, 16).transpose(2, 3) / 0.6
    out = torch.einsum("bshqk,bskhd->bsqhd", logits.softmax(-1) * factor, v.view(2, 2, 16, 2, 16))
    wanted = torch.autograd.grad(out, (q, k, v), factors.view_as(out))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_branches_are_dropped_independently_and_a_seed_repeats():
    pattern = DilatedPattern(segment_lengths=(15, 16), dilation_rates=(1, 1))
    q = torch.zeros(1, 15, 4, 15, device=DEVICE)
    one_hot = torch.eye(15, device=DEVICE)[None, :, None].expand(1, -1, 4, -1)
    counts = dropped(q, q, one_hot, pattern) * 30 * 0.6
    shares = [(counts - value).abs().lt(1e-3).float().mean().item() for value in (0, 1, 2)]
    assert shares == pytest.approx([0.16, 0.48, 0.36], abs=0.08)
    assert torch.equal(dropped(q, q, one_hot, pattern) * 30 * 0.6, counts)
    assert not torch.equal(dropped(q, q, one_hot, pattern, seed=6) * 30 * 0.6, counts)


def test_gradients_repeat_to_the_bit():
    inputs = BIASED["table"].inputs(torch.float32)
    results = []
    for _ in range(2):
        out = dilated_attention(
            inputs["q"], inputs["k"], inputs["v"], CALL.pattern, is_causal=True, backend="triton"
        )
        results.append(torch.autograd.grad(out.square().sum(), [inputs[x] for x in "qkv"]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_packed_documents_heads_and_branches_draw_their_own_dropout():
    pattern = DilatedPattern(segment_lengths=(15, 16), dilation_rates=(1, 1))
    q = torch.zeros(1, 30, 3, 15, device=DEVICE)
    one_hot = torch.eye(15, device=DEVICE).repeat(2, 1)[None, :, None].expand(1, -1, 3, -1)
    bounds = torch.tensor([0, 15, 30], dtype=torch.int32, device=DEVICE)
    # Each weight is 0, 1 or 2 times that of one branch.
    counts = dropped(q, q, one_hot, pattern, cu_seqlens=bounds)
    parts = [counts[0, first : first + 15, head] for first in (0, 15) for head in range(3)]
    for index, part in enumerate(parts):
        assert all(not torch.equal(part, other) for other in parts[index + 1 :])
    # Branch 1 of head 0 must not be branch 0 of head 1: then their counts would move together.
    first, second = (counts[0, :, head].flatten() for head in (0, 1))
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert abs(correlation) < 0.2
