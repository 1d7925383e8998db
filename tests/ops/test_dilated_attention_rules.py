"""One test per rule that implementations of dilated attention are known to break."""

import math

import pytest
import torch
import torch.nn.functional as F

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from tests.ops import brute_force
from tests.ops.draws import FLOAT32

BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "math"])
CAUSAL = pytest.mark.parametrize("is_causal", [False, True])


def pattern_of(lengths, rates, **switches):
    return DilatedPattern(segment_lengths=lengths, dilation_rates=rates, **switches)


def draw(seq_len, num_heads=2, head_dim=4, batch=1):
    return torch.randn(3, batch, seq_len, num_heads, head_dim).unbind(0)


def dense(q, k, v, is_causal):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=is_causal).transpose(1, 2)


@BACKENDS
@CAUSAL
def test_a_tail_segment_is_attention_over_its_own_tokens(backend, is_causal):
    """No padding takes softmax mass: 11 tokens in segments of 8 leave a tail of 3."""
    q, k, v = draw(11)
    out = dilated_attention(q, k, v, pattern_of((8,), (1,)), is_causal=is_causal, backend=backend)
    tail = dense(*(x[:, 8:] for x in (q, k, v)), is_causal)
    torch.testing.assert_close(out[:, 8:], tail, **FLOAT32)


@BACKENDS
def test_the_last_token_of_a_segment_and_one_sees_only_itself(backend):
    q, k, v = draw(1025)
    out, lse = dilated_attention(
        q, k, v, pattern_of((1024,), (1,)), backend=backend, return_lse=True
    )
    torch.testing.assert_close(out[:, -1], v[:, -1], **FLOAT32)
    torch.testing.assert_close(lse[:, -1], (q * k).sum(-1)[:, -1] / 2, **FLOAT32)


@BACKENDS
def test_a_log_sum_exp_of_zero_is_an_ordinary_value(backend):
    """Zero queries make every logit 0, so that the branch of single tokens has LSE 0."""
    _, k, v = draw(4, num_heads=1)
    out, lse = dilated_attention(
        torch.zeros_like(k),
        k,
        v,
        pattern_of((1, 4), (1, 1)),
        is_causal=True,
        backend=backend,
        return_lse=True,
    )
    torch.testing.assert_close(out[:, 0], v[:, 0], **FLOAT32)
    torch.testing.assert_close(out[:, 1], (v[:, 0] + 2 * v[:, 1]) / 3, **FLOAT32)
    expected = torch.tensor([2.0, 3.0, 4.0, 5.0]).log()
    torch.testing.assert_close(lse[0, :, 0], expected, **FLOAT32)
    _, lse = dilated_attention(
        torch.zeros_like(k), k, v, pattern_of((1,), (1,)), backend=backend, return_lse=True
    )
    assert lse.eq(0).all()


@BACKENDS
def test_gradients_include_those_of_the_mixture_weights(backend):
    leaves = [x.double().requires_grad_() for x in draw(6, num_heads=1, head_dim=2)]
    pattern = pattern_of((2, 6), (1, 2))
    assert torch.autograd.gradcheck(
        lambda q, k, v: dilated_attention(q, k, v, pattern, backend=backend), leaves
    )


@BACKENDS
@pytest.mark.parametrize(
    ("head_offset", "expected"),
    [("modulo", [0, 1, 2, 3, 0, 1]), ("block", [0, 0, 1, 1, 2, 2])],
)
def test_head_offsets_of_six_heads_at_rate_four(head_offset, expected, backend):
    q, k, v = draw(4, num_heads=6)
    pattern = pattern_of((4,), (4,), head_offset=head_offset)
    out = dilated_attention(q, k, v, pattern, backend=backend)
    is_used = out[0].ne(0).any(-1).T
    assert is_used.sum(-1).tolist() == [1] * 6
    assert is_used.int().argmax(-1).tolist() == expected


@BACKENDS
def test_rows_that_no_branch_covers_are_zero_with_an_lse_of_minus_infinity(backend):
    q, k, v = draw(10, num_heads=2)
    out, lse = dilated_attention(q, k, v, pattern_of((10,), (2,)), backend=backend, return_lse=True)
    is_covered = (torch.arange(10)[:, None] % 2) == torch.arange(2)
    assert out[0][~is_covered].eq(0).all()
    assert lse[0][~is_covered].isneginf().all()
    assert out[0][is_covered].ne(0).any(-1).all()
    assert lse[0][is_covered].isfinite().all()


@BACKENDS
@CAUSAL
def test_a_fully_padded_row_is_zero_with_finite_gradients(backend, is_causal):
    leaves = [x.clone().requires_grad_() for x in draw(9, batch=2)]
    mask = torch.tensor([[False], [True]]).expand(2, 9)
    out = dilated_attention(
        *leaves,
        pattern_of((3, 9), (1, 2)),
        is_causal=is_causal,
        key_padding_mask=mask,
        backend=backend,
    )
    assert out[1].eq(0).all()
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[1].eq(0).all()
        assert leaf.grad[0].ne(0).any()


@BACKENDS
def test_a_later_value_never_reaches_an_earlier_row(backend):
    q, k, v = draw(16)
    pattern = pattern_of((4, 8, 16), (1, 2, 4))
    out = dilated_attention(q, k, v, pattern, is_causal=True, backend=backend)
    v = v.clone()
    v[:, 15] += 100.0
    moved = dilated_attention(q, k, v, pattern, is_causal=True, backend=backend)
    assert torch.equal(moved[:, :15], out[:, :15])
    assert not torch.equal(moved[:, 15], out[:, 15])


@BACKENDS
@CAUSAL
def test_every_head_attends_by_every_branch(backend, is_causal):
    """Twelve heads, five branches. With zero queries, exp(lse) counts the keys a row sees."""
    lengths, rates = (4, 8, 16, 24, 48), (1, 2, 3, 4, 6)
    pattern = pattern_of(lengths, rates)
    _, k, v = draw(48, num_heads=12)
    _, lse = dilated_attention(
        torch.zeros_like(k),
        k,
        v,
        pattern,
        is_causal=is_causal,
        backend=backend,
        return_lse=True,
    )
    for head in range(12):
        expected = [
            len(brute_force.keys_of_query(pattern, query, 48, head, 12, is_causal)[0])
            for query in range(48)
        ]
        assert lse[0, :, head].exp().tolist() == pytest.approx(expected, rel=1e-5)


@BACKENDS
@CAUSAL
@pytest.mark.parametrize("seq_len", [1, 2, 7, 13, 31, 32, 33])
def test_every_length_keeps_its_rows(seq_len, backend, is_causal):
    leaves = [x.clone().requires_grad_() for x in draw(seq_len, batch=2)]
    out = dilated_attention(
        *leaves, pattern_of((8, 16), (2, 4)), is_causal=is_causal, backend=backend
    )
    assert out.shape == (2, seq_len, 2, 4)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_bias_acts_on_logits_and_not_on_outputs():
    q, k, v = draw(9)
    pattern = pattern_of((4, 9), (1, 2))
    out, lse = dilated_attention(q, k, v, pattern, return_lse=True)
    shifted, shifted_lse = dilated_attention(
        q, k, v, pattern, bias=torch.full((1, 1, 9, 9), 3.0), return_lse=True
    )
    torch.testing.assert_close(shifted, out, **FLOAT32)
    torch.testing.assert_close(shifted_lse, lse + 3.0, **FLOAT32)


@BACKENDS
@CAUSAL
def test_a_rate_that_does_not_divide_its_segment_covers_every_row(backend, is_causal):
    """Segments of five at rate two: heads 0 and 1 take three and two of five."""
    q, k, v = draw(10)
    out, lse = dilated_attention(
        torch.zeros_like(q),
        k,
        v,
        pattern_of((5,), (2,)),
        is_causal=is_causal,
        backend=backend,
        return_lse=True,
    )
    places = torch.arange(10) % 5
    for head in range(2):
        rows = places % 2 == head
        seen = places[rows] // 2 + 1 if is_causal else torch.full((int(rows.sum()),), 3 - head)
        torch.testing.assert_close(lse[0, rows, head], seen.float().log(), **FLOAT32)
        assert out[0, ~rows, head].eq(0).all()


@BACKENDS
@CAUSAL
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_logits_stay_finite(size, backend, is_causal):
    """A query of the key it seeks: the softmax picks that key's value."""
    keys = F.normalize(torch.randn(1, 12, 1, 8), dim=-1)
    v = torch.randn(1, 12, 1, 8)
    leaves = [(keys * size).requires_grad_(), keys.clone().requires_grad_(), v.requires_grad_()]
    out, lse = dilated_attention(
        *leaves,
        pattern_of((4, 12), (1, 3)),
        is_causal=is_causal,
        scale=10.0,
        backend=backend,
        return_lse=True,
    )
    torch.testing.assert_close(out, v, atol=1e-4, rtol=0)
    assert lse.isfinite().all()
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_very_negative_logits_keep_their_softmax(backend):
    q, v = torch.full((1, 6, 1, 2), -300.0), torch.arange(12.0).view(1, 6, 1, 2)
    out, lse = dilated_attention(
        q,
        torch.ones(1, 6, 1, 2),
        v,
        pattern_of((3, 6), (1, 1)),
        scale=1.0,
        backend=backend,
        return_lse=True,
    )
    torch.testing.assert_close(lse[0, :, 0], torch.full((6,), -600 + math.log(9.0)), **FLOAT32)
    counts = torch.ones(6, 6) + torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    torch.testing.assert_close(out[0, :, 0], counts @ v[0, :, 0] / 9, **FLOAT32)
