"""The oracle itself: against loops over Python lists and against published outputs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from longnet_zoo.ops.reference import dilated_attention_reference, visible_keys
from tests.ops import brute_force

FIXTURE = Path(__file__).parents[1] / "fixtures" / "torchscale_dilated_attention.safetensors"

SHAPES = [  # seq_len, num_heads, num_kv_heads, segment_lengths, dilation_rates
    (1, 3, 1, (4, 9), (1, 3)),
    (7, 3, 3, (16,), (1,)),
    (13, 5, 1, (4, 6), (1, 4)),
    (17, 4, 2, (5, 16), (2, 6)),
    (11, 2, 1, (3, 5, 7), (3, 2, 5)),
    (23, 6, 3, (2, 9, 64), (1, 4, 7)),
]


def fields(lengths, rates, head_offset="modulo", padded_keys="ignore"):
    """Plain fields, which is all the oracle may read of a pattern."""
    return SimpleNamespace(
        segment_lengths=lengths,
        dilation_rates=rates,
        head_offset=head_offset,
        padded_keys=padded_keys,
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_offset", ["modulo", "block"])
@pytest.mark.parametrize("padded_keys", ["ignore", "zero"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_row_equals_the_loop_over_lists(shape, head_offset, padded_keys, is_causal):
    seq_len, num_heads, num_kv_heads, lengths, rates = shape
    pattern = fields(lengths, rates, head_offset, padded_keys)
    q = draw(2, seq_len, num_heads, 4, seed=1)
    k, v = (draw(2, seq_len, num_kv_heads, 4, seed=s) for s in (2, 3))
    table = draw(num_heads, 2 * seq_len, seed=4)
    out, lse = dilated_attention_reference(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        scale=0.7,
        bias=lambda distances: table[:, distances + seq_len],
        xpos_scale_base=11.0,
        return_lse=True,
    )
    for query in range(seq_len):
        for head in range(num_heads):
            expected, expected_lse = brute_force.row(
                q,
                k,
                v,
                pattern,
                1,
                query,
                head,
                is_causal=is_causal,
                scale=0.7,
                base=11.0,
                bias=lambda distance, h: table[h, distance + seq_len].item(),
            )
            assert out[1, query, head].tolist() == pytest.approx(expected, abs=1e-12)
            assert lse[1, query, head].item() == pytest.approx(expected_lse, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_offset", ["modulo", "block"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_counts_equal_the_lists_of_keys(shape, head_offset, is_causal):
    seq_len, num_heads, _, lengths, rates = shape
    pattern = fields(lengths, rates, head_offset, "zero")
    counts, zero_keys = visible_keys(
        pattern, batch=1, seq_len=seq_len, num_heads=num_heads, is_causal=is_causal
    )
    for head in range(num_heads):
        for query in range(seq_len):
            keys, zeros = brute_force.keys_of_query(
                pattern, query, seq_len, head, num_heads, is_causal
            )
            expected = [keys.count(key) for key in range(seq_len)]
            assert counts[0, head, query].tolist() == expected
            assert zero_keys[0, head, query].item() == zeros


def test_published_outputs_are_reproduced():
    """Outputs of torchscale's DilatedAttention, commit 4d1e0e8."""
    with safe_open(FIXTURE, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        assert len(cases) == 10
        for number, case in cases.items():
            assert case["padded_keys"] == "attend_as_zero"
            q, k, v = (file.get_tensor(f"{number}.{name}") for name in "qkv")
            lengths, rates = tuple(case["segment_lengths"]), tuple(case["dilation_rates"])
            pattern = fields(lengths, rates, case["head_offset"], "zero")
            out = dilated_attention_reference(q, k, v, pattern, is_causal=case["is_causal"])
            expected = file.get_tensor(f"{number}.out").double()
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("modulo", [0, 1, 2, 3, 0, 1]), ("block", [0, 0, 1, 1, 2, 2])],
)
def test_offsets_of_six_heads_at_rate_four(kind, expected):
    counts, _ = visible_keys(fields((4,), (4,), kind), batch=1, seq_len=4, num_heads=6)
    rows = counts[0].diagonal(dim1=-2, dim2=-1)
    assert rows.argmax(-1).tolist() == expected
    assert rows.sum(-1).tolist() == [1] * 6


def test_two_tokens_by_hand():
    """Token 1 sees token 0 by one branch and itself by two."""
    pattern = fields((1, 2), (1, 1))
    q = torch.ones(1, 2, 1, 1)
    k = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)
    v = torch.tensor([7.0, 14.0]).view(1, 2, 1, 1)
    out, lse = dilated_attention_reference(
        q, k, v, pattern, is_causal=True, scale=1.0, return_lse=True
    )
    assert out.flatten().tolist() == pytest.approx([7.0, (7 + 2 * 3 * 14) / 7])
    assert lse.flatten().tolist() == pytest.approx([math.log(2.0), math.log(7.0)])


def test_zero_keys_by_hand():
    """The tail segment has two of its three tokens: of slots 0 and 2 only the first is there."""
    pattern = fields((3,), (2,), padded_keys="zero")
    q, k = torch.zeros(1, 5, 1, 1), torch.zeros(1, 5, 1, 1)
    v = torch.arange(1.0, 6.0).view(1, 5, 1, 1)
    out = dilated_attention_reference(q, k, v, pattern)
    assert out.flatten().tolist() == pytest.approx([2.0, 0.0, 2.0, 4 / 2, 0.0])


@pytest.mark.parametrize("padded_keys", ["ignore", "zero"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_right_padding_and_packing_equal_each_sequence_alone(padded_keys, is_causal):
    pattern = fields((4, 10), (1, 3), padded_keys=padded_keys)
    lengths, options = (9, 1, 6), {"is_causal": is_causal, "return_lse": True}
    q, k, v = (draw(3, 9, 4, 4, seed=s) for s in range(3))
    mask = torch.arange(9) >= torch.tensor(lengths)[:, None]
    out, lse = dilated_attention_reference(q, k, v, pattern, key_padding_mask=mask, **options)
    assert out[mask].eq(0).all()
    assert lse[mask].isneginf().all()
    packed = [x[~mask][None] for x in (q, k, v)]
    bounds = torch.tensor([0, 9, 10, 16], dtype=torch.int32)
    pack, pack_lse = dilated_attention_reference(*packed, pattern, cu_seqlens=bounds, **options)
    for row, length in enumerate(lengths):
        alone = (x[row : row + 1, :length] for x in (q, k, v))
        expected, expected_lse = dilated_attention_reference(*alone, pattern, **options)
        torch.testing.assert_close(out[row : row + 1, :length], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse[row : row + 1, :length], expected_lse, atol=1e-12, rtol=0)
        inside = slice(int(bounds[row]), int(bounds[row + 1]))
        torch.testing.assert_close(pack[:, inside], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(pack_lse[:, inside], expected_lse, atol=1e-12, rtol=0)


def test_other_padding_keeps_positions():
    """With token 1 padded, token 0 still shares its segment (0, 1) with nobody else."""
    mask = torch.tensor([[False, True, False, False]])
    counts, _ = visible_keys(
        fields((2,), (1,)), batch=1, seq_len=4, num_heads=1, key_padding_mask=mask
    )
    assert counts[0, 0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_zero_keys_refuse_padding_other_than_right():
    mask = torch.tensor([[False, True], [True, False]])
    with pytest.raises(ValueError, match=r'padded_keys="zero".*batch rows \[1\]'):
        visible_keys(
            fields((2,), (1,), padded_keys="zero"),
            batch=2,
            seq_len=2,
            num_heads=1,
            key_padding_mask=mask,
        )


def test_padding_and_packing_together_are_refused():
    with pytest.raises(ValueError, match="got both"):
        visible_keys(
            fields((2,), (1,)),
            batch=1,
            seq_len=2,
            num_heads=1,
            key_padding_mask=torch.zeros(1, 2, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, 2]),
        )


def test_rows_that_nothing_reaches_are_zero_with_finite_gradients():
    leaves = [draw(1, 9, 1, 4, seed=s).requires_grad_() for s in range(3)]
    out, lse = dilated_attention_reference(*leaves, fields((6,), (3,)), return_lse=True)
    reached = torch.arange(9) % 6 % 3 == 0
    assert out[0, ~reached].eq(0).all()
    assert lse[0, ~reached].isneginf().all()
    assert lse[0, reached].isfinite().all()
    (out.sum() + lse[0, reached].sum()).backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[0, ~reached].eq(0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_pass_gradcheck(is_causal):
    pattern = fields((3, 5), (1, 3), padded_keys="zero")
    q = draw(1, 7, 2, 2, seed=1).requires_grad_()
    k, v = (draw(1, 7, 1, 2, seed=s).requires_grad_() for s in (2, 3))
    bias = draw(1, 2, 7, 7, seed=4).requires_grad_()

    def call(q, k, v, bias):
        return dilated_attention_reference(
            q, k, v, pattern, is_causal=is_causal, bias=bias, xpos_scale_base=5.0, return_lse=True
        )

    assert torch.autograd.gradcheck(call, (q, k, v, bias))
