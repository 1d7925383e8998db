"""The xPos decay inside the op: its definition, its range, and one million tokens."""

import dataclasses

import pytest
import torch

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from tests.ops import brute_force
from tests.ops.draws import FLOAT32, HALF, Call, assert_parity

CALL = Call(
    segment_lengths=(5, 12, 31),
    dilation_rates=(1, 3, 4),
    seq_len=43,
    batch=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=6,
    xpos_scale_base=40.0,
)
MILLION = 1_048_576


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded_keys", ["ignore", "zero"])
@pytest.mark.parametrize("head_offset", ["modulo", "block"])
def test_decay_and_gradients_equal_the_oracle(head_offset, padded_keys, is_causal, backend):
    call = dataclasses.replace(
        CALL, head_offset=head_offset, padded_keys=padded_keys, is_causal=is_causal
    )
    assert_parity(call, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_other_dtypes_equal_the_oracle(dtype, is_causal):
    for backend in ("sdpa", "math"):
        assert_parity(dataclasses.replace(CALL, is_causal=is_causal), backend, dtype)


def test_decay_with_grouped_queries_bias_and_padding_equals_the_oracle():
    for padding in ("right", "left", "random"):
        for bias in ("dense", "table"):
            assert_parity(dataclasses.replace(CALL, padding=padding, bias=bias))


def test_a_key_of_one_channel_pair_decays_by_its_zeta():
    """Unit queries and keys in pair c: logits are zeta_c ** ((i - j) / base), nothing else."""
    base, head_dim = 8.0, 6
    pattern = DilatedPattern(segment_lengths=(7,), dilation_rates=(1,))
    for pair in range(3):
        x = torch.zeros(1, 7, 1, head_dim)
        x[..., 2 * pair] = 1.0
        _, lse = dilated_attention(
            x, x, x, pattern, is_causal=True, scale=1.0, xpos_scale_base=base, return_lse=True
        )
        zeta = torch.tensor((2 * pair / head_dim + 0.4) / 1.4)
        logits = zeta ** (torch.arange(7) / base)
        expected = torch.logcumsumexp(logits, dim=0)
        torch.testing.assert_close(lse[0, :, 0], expected, **FLOAT32)


def test_an_unbounded_base_is_no_decay():
    call = dataclasses.replace(CALL, xpos_scale_base=None)
    q, k, v = call.inputs(torch.float32).values()
    out = dilated_attention(q, k, v, call.pattern, xpos_scale_base=1e12)
    torch.testing.assert_close(out, dilated_attention(q, k, v, call.pattern), **FLOAT32)


def test_decay_does_not_depend_on_where_a_segment_lies():
    """The same tokens in the first and the 40th segment give the same bits."""
    q, k, v = torch.randn(3, 1, 16, 2, 8).unbind(0)
    pattern = DilatedPattern(segment_lengths=(16,), dilation_rates=(1,))
    repeated = (x.repeat(1, 40, 1, 1) for x in (q, k, v))
    out = dilated_attention(*repeated, pattern, is_causal=True, xpos_scale_base=4.0)
    segments = out.unflatten(1, (40, 16))
    assert torch.equal(segments[:, 39], segments[:, 0])


def direct_row(q, k, v, pattern, query, is_causal, base, factor):
    """One row in float64 from its list of keys: out and its gradient into that query."""
    seq_len, head_dim = q.shape[1], q.shape[3]
    keys, _ = brute_force.keys_of_query(pattern, query, seq_len, 0, 1, is_causal)
    channels = torch.arange(head_dim, dtype=torch.float64) // 2
    zeta = (2 * channels / head_dim + 0.4) / 1.4
    distance = torch.tensor([query - key for key in keys], dtype=torch.float64)
    vector = q[0, query, 0].double().requires_grad_()
    decay = zeta ** (distance[:, None] / base)
    logits = (vector * k[0, keys, 0].double() * decay).sum(-1) / head_dim**0.5
    out = logits.softmax(0) @ v[0, keys, 0].double()
    (grad,) = torch.autograd.grad((out * factor.double()).sum(), [vector])
    return out.detach(), grad


def million_tokens(dtype):
    """q, k, v of one head, and rows at both ends, at segment borders and in between."""
    qkv = [torch.randn(1, MILLION, 1, 16).to(dtype) for _ in range(3)]
    rows = [0, 1, 63, 64, 32_767, 32_768, 524_287, 900_001, MILLION - 64, MILLION - 1]
    return qkv, rows + torch.randint(MILLION, (20,)).tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, HALF)])
def test_a_million_tokens_are_finite_and_right(dtype, tolerance):
    """Segments up to 32,768 at the usual base of 512, forward and the gradient of queries."""
    (q, k, v), rows = million_tokens(dtype)
    q.requires_grad_()
    k.requires_grad_()
    pattern = DilatedPattern(segment_lengths=(64, 32_768), dilation_rates=(1, 512))
    out, lse = dilated_attention(
        q, k, v, pattern, is_causal=True, xpos_scale_base=512.0, return_lse=True
    )
    factor = torch.randn(16).to(dtype)
    q_grad, k_grad = torch.autograd.grad((out * factor).sum(), [q, k])
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert q_grad.isfinite().all()
    assert k_grad.isfinite().all()
    q, k = q.detach(), k.detach()
    for row in rows:
        expected, expected_grad = direct_row(q, k, v, pattern, row, True, 512.0, factor)
        torch.testing.assert_close(out[0, row, 0].double(), expected, **tolerance)
        torch.testing.assert_close(q_grad[0, row, 0].double(), expected_grad, **tolerance)


def test_a_million_tokens_that_look_ahead_are_right():
    """Logits of later keys grow twelvefold over a segment of 4096 at a base of 2048."""
    (q, k, v), rows = million_tokens(torch.float32)
    pattern = DilatedPattern(segment_lengths=(16, 4096), dilation_rates=(1, 128))
    out = dilated_attention(q, k, v, pattern, xpos_scale_base=2048.0)
    for row in rows:
        expected, _ = direct_row(q, k, v, pattern, row, False, 2048.0, torch.ones(16))
        torch.testing.assert_close(out[0, row, 0].double(), expected, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_tokens_that_look_ahead_are_finite_at_the_usual_base(dtype):
    """Logits reach exp(80) in segments of 32,768: one key takes it all, and nothing overflows."""
    (q, k, v), _ = million_tokens(dtype)
    pattern = DilatedPattern(segment_lengths=(64, 32_768), dilation_rates=(1, 512))
    out, lse = dilated_attention(q, k, v, pattern, xpos_scale_base=512.0, return_lse=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert lse.max() > 1e30
