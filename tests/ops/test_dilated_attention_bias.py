"""Additive logits: dense and by distance, ALiBi-like and learned tables, with their gradients."""

import dataclasses

import pytest
import torch
from torch import nn

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import alibi_slopes
from tests.ops.draws import FLOAT32, HALF, Call, assert_parity, oracle_results, results

CALL = Call(
    segment_lengths=(4, 10, 19),
    dilation_rates=(1, 3, 4),
    seq_len=29,
    batch=2,
    num_heads=6,
    num_kv_heads=2,
)
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])
PATTERN = CALL.pattern


def draw():
    return [x.detach().requires_grad_() for x in CALL.inputs(torch.float32).values()]


@CAUSAL
@pytest.mark.parametrize("bias", ["dense", "dense_shared", "table", "alibi"])
@pytest.mark.parametrize("head_offset", ["modulo", "block"])
@pytest.mark.parametrize("padded_keys", ["ignore", "zero"])
def test_a_bias_and_its_gradient_equal_the_oracle(padded_keys, head_offset, bias, is_causal):
    call = dataclasses.replace(
        CALL, padded_keys=padded_keys, head_offset=head_offset, bias=bias, is_causal=is_causal
    )
    assert_parity(call)
    assert_parity(call, with_lse_grad=True)


@CAUSAL
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 6), (2, 6)])
def test_a_dense_bias_is_shared_by_what_it_has_one_of(shape, is_causal):
    """The gradient of a shared bias is the sum over what shares it."""
    q, k, v = draw()
    parts = torch.randn(*shape, 29, 29)
    small, large = parts.clone().requires_grad_(), parts.expand(2, 6, -1, -1).clone()
    large.requires_grad_()
    factors = torch.randn(2, 29, 6, 4)
    grads = []
    for bias in (small, large):
        out = dilated_attention(q, k, v, PATTERN, is_causal=is_causal, bias=bias)
        (grad,) = torch.autograd.grad((out * factors).sum(), [bias])
        grads.append((out.detach(), grad.sum_to_size(small.shape)))
    torch.testing.assert_close(grads[0][0], grads[1][0], **FLOAT32)
    torch.testing.assert_close(grads[0][1], grads[1][1], **FLOAT32)


@CAUSAL
def test_a_bias_by_distance_equals_the_dense_tensor_of_its_values(is_causal):
    """Outputs and gradients, the one into the table being the sum along the diagonals."""
    inputs = draw()
    table = torch.randn(6, 57, requires_grad=True)
    distances = torch.arange(29) - torch.arange(29)[:, None]
    factors = torch.randn(2, 29, 6, 4)

    def by_distance(d):
        return table[:, d + 28]

    grads = []
    for bias in (by_distance, by_distance(distances.flatten()).view(1, 6, 29, 29)):
        out = dilated_attention(*inputs, PATTERN, is_causal=is_causal, bias=bias)
        grads.append((out, *torch.autograd.grad((out * factors).sum(), [*inputs, table])))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, **FLOAT32)
    assert grads[0][4].ne(0).any()


def test_the_sign_of_a_distance_is_key_minus_query():
    """A bias of plus infinity for the previous token: each row returns that token's value."""
    q, k, v = draw()
    pattern = DilatedPattern(segment_lengths=(29,), dilation_rates=(1,))
    out = dilated_attention(q, k, v, pattern, bias=lambda d: 1e4 * (d == -1).float().expand(6, -1))
    expected = v.repeat_interleave(3, dim=2)[:, :-1]
    torch.testing.assert_close(out[:, 1:], expected, **FLOAT32)


def test_alibi_by_distance_equals_its_dense_tensor():
    q, k, v = draw()
    slopes = alibi_slopes(6)
    distances = (torch.arange(29) - torch.arange(29)[:, None]).abs()
    dense = -slopes[None, :, None, None] * distances
    out = dilated_attention(q, k, v, PATTERN, bias=lambda d: -slopes[:, None] * d.abs())
    torch.testing.assert_close(out, dilated_attention(q, k, v, PATTERN, bias=dense), **FLOAT32)


class Table(nn.Module):
    """A learned value per head and clipped distance; remembers how much it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 6))
        self.num_asked = 0

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        assert distances.dtype == torch.int64
        assert distances.ndim == 1
        self.num_asked += distances.numel()
        return self.weight[distances.clamp(-5, 5) + 5].T


@CAUSAL
def test_a_module_gets_its_gradient(is_causal):
    q, k, v = draw()
    module = Table()
    factors = torch.randn(2, 29, 6, 4)
    out = dilated_attention(q, k, v, PATTERN, is_causal=is_causal, bias=module)
    (out * factors).sum().backward()
    distances = torch.arange(29) - torch.arange(29)[:, None]
    dense = module(distances.flatten()).view(1, 6, 29, 29)
    expected = dilated_attention(q, k, v, PATTERN, is_causal=is_causal, bias=dense)
    (grad,) = torch.autograd.grad((expected * factors).sum(), [module.weight])
    torch.testing.assert_close(module.weight.grad, grad, **FLOAT32)


def test_no_square_of_distances_is_ever_asked_for():
    module = Table()
    pattern = DilatedPattern(segment_lengths=(16, 64), dilation_rates=(1, 4))
    q, k, v = torch.randn(3, 1, 1000, 6, 4).unbind(0)
    dilated_attention(q, k, v, pattern, bias=module)
    assert 0 < module.num_asked <= 2 * 64


def test_a_dense_bias_of_minus_infinity_hides_keys():
    """A row whose keys are all hidden is zero, and all gradients stay finite."""
    inputs = draw()
    bias = torch.zeros(1, 1, 29, 29)
    bias[..., 3] = -torch.inf
    bias[..., 7, :] = -torch.inf
    bias.requires_grad_()
    out, lse = dilated_attention(*inputs, PATTERN, bias=bias, return_lse=True)
    assert out[:, 7].eq(0).all()
    assert lse[:, 7].isneginf().all()
    grads = torch.autograd.grad(out.sum(), [*inputs, bias])
    assert all(grad.isfinite().all() for grad in grads)
    changed = [x.detach().clone() for x in inputs]
    for x in changed[1:]:
        x[:, 3] += 5.0
    assert torch.equal(dilated_attention(*changed, PATTERN, bias=bias), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", ["dense", "table"])
def test_a_float32_bias_serves_half_types(bias, dtype):
    call = dataclasses.replace(CALL, bias=bias)
    inputs = call.inputs(dtype)
    assert inputs["bias"].dtype == torch.float32
    got, expected = results(call, inputs), oracle_results(call, inputs)
    assert got["d_bias"].dtype == torch.float32
    for name, value in got.items():
        torch.testing.assert_close(value.double(), expected[name], **HALF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_gradient_of_a_bias_has_its_dtype(dtype):
    q, k, v = draw()
    bias = torch.randn(1, 6, 29, 29, dtype=dtype, requires_grad=True)
    dilated_attention(q, k, v, PATTERN, bias=bias).sum().backward()
    assert bias.grad.dtype == dtype
    assert bias.grad.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_autocast_changes_nothing_inside_the_op(is_causal):
    pattern = DilatedPattern(segment_lengths=(8, 16), dilation_rates=(1, 2))
    q, k, v = (torch.randn(1, 21, 2, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    table = torch.randn(2, 41, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = dilated_attention(
                q, k, v, pattern, is_causal=is_causal, bias=lambda d: table[:, d + 20]
            )
            results.append((out, *torch.autograd.grad(out.float().sum(), (q, k, v, table))))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)
