"""Attention dropout: unbiased, repeatable by seed, and with the gradient of what it computed."""

import pytest
import torch

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from tests.ops.draws import FLOAT64

PATTERN = DilatedPattern(segment_lengths=(3, 8), dilation_rates=(1, 2))
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])


def draw(batch=1, seq_len=11, dtype=torch.float64):
    return [torch.randn(batch, seq_len, heads, 4, dtype=dtype) for heads in (4, 2, 2)]


def attend(q, k, v, seed, dropout_p=0.3, **more):
    torch.manual_seed(seed)
    return dilated_attention(q, k, v, PATTERN, dropout_p=dropout_p, **more)


def kept_weights(seq_len, dropout_p, pattern=PATTERN, batch=2, num_heads=4, **more):
    """Attention weights one by one: with one-hot values, channel j of row i is its weight on j."""
    q = torch.zeros(batch, seq_len, num_heads, seq_len)
    v = torch.eye(seq_len)[None, :, None].expand(batch, -1, num_heads, -1)
    return dilated_attention(q, q, v, pattern, dropout_p=dropout_p, **more).transpose(1, 2)


@CAUSAL
def test_no_dropout_is_bit_identical(is_causal):
    q, k, v = draw(dtype=torch.float32)
    out = dilated_attention(q, k, v, PATTERN, is_causal=is_causal)
    again = attend(q, k, v, 1, dropout_p=0.0, is_causal=is_causal)
    assert torch.equal(again, out)
    assert torch.equal(attend(q, k, v, 2, dropout_p=0.0, is_causal=is_causal), out)


def test_no_dropout_draws_no_random_numbers():
    q, k, v = draw()
    before = torch.get_rng_state()
    dilated_attention(q, k, v, PATTERN)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_seed_repeats_output_and_gradient(dtype):
    inputs = [x.requires_grad_() for x in draw(dtype=dtype)]
    factors = torch.randn(1, 11, 4, 4, dtype=dtype)

    def out_and_grads(seed):
        out = attend(*inputs, seed)
        return [out, *torch.autograd.grad((out * factors).sum(), inputs)]

    first, again, other = out_and_grads(5), out_and_grads(5), out_and_grads(6)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_random_numbers_drawn_before_the_backward_do_not_change_it():
    inputs = [x.requires_grad_() for x in draw()]
    grads = []
    for num_drawn in (0, 17):
        out = attend(*inputs, 5)
        torch.rand(num_drawn)
        grads.append(torch.autograd.grad(out.sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@CAUSAL
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_mean_over_seeds_is_the_output_without_dropout(dropout_p, is_causal):
    """2000 draws, 40 seeds of 50 equal rows: within five standard errors everywhere."""
    q, k, v = draw()
    exact = dilated_attention(q, k, v, PATTERN, is_causal=is_causal)
    rows = [x.expand(50, -1, -1, -1) for x in (q, k, v)]
    drawn = torch.cat([attend(*rows, seed, dropout_p, is_causal=is_causal) for seed in range(40)])
    errors = drawn.std(0) / len(drawn) ** 0.5
    assert errors.max() > 0
    assert ((drawn.mean(0) - exact[0]).abs() <= 5 * errors + 1e-12).all()


@pytest.mark.parametrize("dropout_p", [0.2, 0.75])
def test_weights_are_dropped_or_scaled_up(dropout_p):
    """With zero queries every weight is 1 / keys, so each is 0 or 1 / keys / (1 - p)."""
    pattern = DilatedPattern(segment_lengths=(40,), dilation_rates=(1,))
    weights = kept_weights(40, dropout_p, pattern)
    is_kept = weights != 0
    expected = torch.full_like(weights[is_kept], 1 / 40 / (1 - dropout_p))
    torch.testing.assert_close(weights[is_kept], expected)
    share, num = is_kept.float().mean().item(), is_kept.numel()
    error = (dropout_p * (1 - dropout_p) / num) ** 0.5
    assert share == pytest.approx(1 - dropout_p, abs=5 * error)


def test_rows_heads_batches_and_segments_are_dropped_independently():
    pattern = DilatedPattern(segment_lengths=(20,), dilation_rates=(1,))
    is_kept = kept_weights(60, 0.5, pattern) != 0
    # (batch, head, segment, query, key) of the three segments of twenty.
    blocks = torch.stack([is_kept[:, :, s : s + 20, s : s + 20] for s in (0, 20, 40)], dim=2)
    for axis in range(4):
        a, b = blocks.select(axis, 0), blocks.select(axis, 1)
        agreement = (a == b).float().mean().item()
        assert agreement == pytest.approx(0.5, abs=5 * 0.5 / a.numel() ** 0.5)


def test_branches_are_dropped_independently():
    """Two branches reach the same keys: each of a pair's two weights is dropped by itself."""
    pattern = DilatedPattern(segment_lengths=(30, 31), dilation_rates=(1, 1))
    weights = kept_weights(30, 0.5, pattern) * 30
    shares = [(weights - value).abs().lt(1e-4).float().mean().item() for value in (0, 1, 2)]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=5 * 0.5 / weights.numel() ** 0.5)


@CAUSAL
def test_the_normaliser_is_not_dropped(is_causal):
    q, k, v = draw(dtype=torch.float32)
    _, lse = dilated_attention(
        q, k, v, PATTERN, is_causal=is_causal, return_lse=True, backend="math"
    )
    _, dropped = attend(q, k, v, 3, is_causal=is_causal, return_lse=True)
    assert torch.equal(dropped, lse)


def test_the_future_stays_hidden():
    weights = kept_weights(23, 0.4, is_causal=True)
    assert weights.triu(1).eq(0).all()
    assert weights.ne(0).any()


@CAUSAL
@pytest.mark.parametrize("bias", ["none", "dense", "table"])
@pytest.mark.parametrize("mask", ["none", "right", "left", "packed"])
def test_the_gradient_is_that_of_the_forward(mask, bias, is_causal):
    """Finite differences at a fixed seed, out and lse."""
    seq_len = 6
    parameter = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(1, 2, seq_len, seq_len, dtype=torch.float64, requires_grad=True)
    extra = {"none": (), "dense": (dense,), "table": (parameter,)}[bias]
    qkv = [torch.randn(1, seq_len, heads, 2).double().requires_grad_() for heads in (2, 1, 1)]
    order = torch.arange(seq_len)
    options = {
        "none": {},
        "right": {"key_padding_mask": (order >= 5)[None]},
        "left": {"key_padding_mask": (order < 2)[None]},
        "packed": {"cu_seqlens": torch.tensor([0, 1, 6], dtype=torch.int32)},
    }[mask]

    def call(q, k, v, values=None):
        torch.manual_seed(9)
        out, lse = dilated_attention(
            q,
            k,
            v,
            PATTERN,
            is_causal=is_causal,
            bias=(lambda d: values[:, d + 6]) if bias == "table" else values,
            dropout_p=0.4,
            return_lse=True,
            **options,
        )
        return out, torch.where(lse.isneginf(), 0.0, lse)

    assert torch.autograd.gradcheck(call, (*qkv, *extra), fast_mode=True)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_strides_of_the_gradient_do_not_matter(mask):
    """As when the output was cut out of or padded into a longer sequence."""
    inputs = [x.requires_grad_() for x in draw(batch=2, seq_len=16)]
    padding = torch.arange(16).expand(2, -1) < 3 if mask == "left" else None
    pattern = DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 2))
    torch.manual_seed(5)
    outputs = dilated_attention(
        *inputs, pattern, dropout_p=0.4, key_padding_mask=padding, return_lse=True
    )
    factors = [torch.randn(2, 20, *x.shape[2:], dtype=x.dtype)[:, :16] for x in outputs]
    grads = [
        torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
        for cotangents in (factors, [x.contiguous() for x in factors])
    ]
    for strided, contiguous in zip(*grads, strict=True):
        assert torch.equal(strided, contiguous)


def test_dropout_keeps_padding_out():
    q, k, v = draw(batch=2)
    mask = torch.arange(11) >= torch.tensor([[11], [4]])
    out = attend(q, k, v, 3, key_padding_mask=mask)
    assert out[mask].eq(0).all()
    k, v = k.clone(), v.clone()
    k[mask], v[mask] = 50.0, 50.0
    torch.testing.assert_close(attend(q, k, v, 3, key_padding_mask=mask), out, **FLOAT64)
