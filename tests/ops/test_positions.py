"""Rotary tables, xPos range, ALiBi slopes and relative buckets, against their definitions."""

import math
from fractions import Fraction

import pytest
import torch

from longnet_zoo.ops import positions as positions_module
from longnet_zoo.ops.positions import (
    alibi_slopes,
    apply_rotary,
    check_xpos_range,
    relative_buckets,
    rotary_tables,
    xpos_zeta,
)


def test_angles_are_exact_at_a_million_positions():
    head_dim, position = 10, 1_048_576
    cos, sin = rotary_tables(torch.tensor([position]), head_dim, base=10000.0)
    for pair in range(head_dim // 2):
        angle = position * 10000.0 ** (-2 * pair / head_dim)
        assert cos[0, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
    # The shortcut that this guards against: angles in float32 are visibly off.
    coarse = torch.tensor(float(position)) * torch.tensor(10000.0) ** (-2 / 10)
    assert abs(coarse.item() - position * 10000.0 ** (-2 / 10)) > 1e-3


def test_tables_are_float32_and_chunks_join(monkeypatch):
    positions = torch.arange(29)
    whole = rotary_tables(positions, 6, base=100.0)
    monkeypatch.setattr(positions_module, "_POSITIONS_PER_CHUNK", 7)
    chunked = rotary_tables(positions, 6, base=100.0)
    for expected, table in zip(whole, chunked, strict=True):
        assert table.dtype == torch.float32
        assert table.shape == (29, 3)
        assert torch.equal(table, expected)


def test_rotation_multiplies_neighbouring_pairs_as_complex_numbers():
    x = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([0, 3, 4, 11, 1000])
    out = apply_rotary(x, *rotary_tables(positions, 8))
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turned = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    torch.testing.assert_close(
        out, torch.view_as_real(turned).flatten(-2).float(), atol=1e-6, rtol=0
    )


def test_compiled_rotation_equals_the_eager_one():
    """They are two formulas: the compiler gets one without complex numbers."""
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    tables = rotary_tables(torch.arange(5) * 1000, 8)
    out = apply_rotary(x, *tables)
    compiled = torch.compile(apply_rotary, fullgraph=True, backend="aot_eager")(x, *tables)
    torch.testing.assert_close(compiled, out, atol=1e-6, rtol=0)
    cotangent = torch.randn_like(out)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (out, compiled)]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=0)
    # A rotation preserves products, so its gradient is the rotation back.
    back = apply_rotary(cotangent, tables[0], -tables[1])
    torch.testing.assert_close(grads[0], back, atol=1e-6, rtol=0)


def test_strided_input():
    x = torch.randn(2, 8, 3, 5).transpose(1, 3)
    tables = rotary_tables(torch.arange(5), 8)
    assert torch.equal(apply_rotary(x, *tables), apply_rotary(x.contiguous(), *tables))


def test_rotated_products_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 6).double(), torch.randn(1, 1, 1, 6).double()

    def product(query_position, key_position):
        rotated = [
            apply_rotary(x, *rotary_tables(torch.tensor([position]), 6))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (rotated[0] * rotated[1]).sum().item()

    assert product(7, 3) == pytest.approx(product(1_000_004, 1_000_000), abs=1e-5)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rotated_in_float32(dtype):
    x = torch.randn(1, 9, 2, 4).to(dtype)
    tables = rotary_tables(torch.arange(9), 4)
    out = apply_rotary(x, *tables)
    assert out.dtype == dtype
    assert torch.equal(out, apply_rotary(x.float(), *tables).to(dtype))


def test_float64_is_kept():

    x = torch.randn(1, 2, 1, 4).double()
    assert apply_rotary(x, *rotary_tables(torch.arange(2), 4)).dtype == torch.float64


def test_rotary_rejects_bad_input():
    with pytest.raises(ValueError, match="head_dim=5"):
        rotary_tables(torch.arange(3), 5)
    with pytest.raises(ValueError, match=r"base must be above 1, got 0\.5"):
        rotary_tables(torch.arange(3), 4, base=0.5)
    cos, sin = rotary_tables(torch.arange(3), 4)
    with pytest.raises(ValueError, match=r"x \(1, 4, 2, 4\), cos \(3, 2\)"):
        apply_rotary(torch.zeros(1, 4, 2, 4), cos, sin)


def test_zeta_is_the_published_scale():
    # torchscale stores (2c + 0.4 d) / (1.4 d) in its checkpoints.
    expected = torch.tensor([(2 * c + 0.4 * 6) / (1.4 * 6) for c in range(3)])
    torch.testing.assert_close(xpos_zeta(6).float(), expected)
    assert xpos_zeta(6).dtype == torch.float64
    with pytest.raises(ValueError, match="head_dim=3"):
        xpos_zeta(3)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_xpos_segments_are_admitted(is_causal, dtype):
    check_xpos_range(span=32_768, head_dim=64, scale_base=512, is_causal=is_causal, dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_admitted_xpos_factors_fit_the_dtype(dtype, is_causal):
    """The longest admitted span stays finite with large values; a little more is refused."""
    arguments = {"head_dim": 8, "scale_base": 512.0, "is_causal": is_causal, "dtype": dtype}
    low, high = 1, 2**24
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            check_xpos_range(span=middle, **arguments)
            low = middle
        except ValueError:
            high = middle
    log_factor = low / 2 / 512.0 * -math.log(xpos_zeta(8)[0].item())
    sum_dtype = torch.promote_types(dtype, torch.float32)
    assert math.exp(log_factor) * 100 < torch.finfo(dtype).max
    if is_causal:
        # Not refused without need: e^12 more would overflow.
        assert log_factor + 12 > math.log(torch.finfo(dtype).max)
    else:
        assert 2 * log_factor + math.log(20) < math.log(torch.finfo(sum_dtype).max)
        assert low >= 4_000


@pytest.mark.parametrize(("is_causal", "base"), [(True, 806), (False, 1474)])
def test_overflowing_xpos_names_a_base_that_works(is_causal, base):
    arguments = {"span": 10**5, "head_dim": 64, "is_causal": is_causal, "dtype": torch.float32}
    with pytest.raises(ValueError, match=r"scale_base=512 overflows .*100000 positions") as error:
        check_xpos_range(scale_base=512, **arguments)
    assert f"Use scale_base={base} or more" in str(error.value)
    check_xpos_range(scale_base=base, **arguments)
    with pytest.raises(ValueError, match=f"scale_base={base - 1}"):
        check_xpos_range(scale_base=base - 1, **arguments)


def test_xpos_base_must_be_positive():
    with pytest.raises(ValueError, match="scale_base must be positive, got scale_base=0"):
        check_xpos_range(span=8, head_dim=4, scale_base=0, is_causal=True, dtype=torch.float32)


def test_alibi_slopes_of_the_paper():
    expected_8 = [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(8).tolist() == expected_8
    # 12 heads: those of 8, then the 1st, 3rd, 5th, 7th of 16.
    expected_12 = expected_8 + [2.0 ** (-(2 * i + 1) / 2) for i in range(4)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected_12))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        alibi_slopes(0)


def _bucket_by_integers(distance, num_buckets, max_distance, bidirectional):
    """The definition with rational numbers only: no logarithm, no rounding."""
    later = 0
    if bidirectional:
        num_buckets //= 2
        later = num_buckets if distance > 0 else 0
        length = abs(distance)
    else:
        length = max(-distance, 0)
    exact = num_buckets // 2
    if length < exact:
        return later + length
    steps = num_buckets - exact
    # Largest k with (length / exact)^steps >= (max_distance / exact)^k.
    k = 0
    while k < steps - 1 and (
        Fraction(length, exact) ** steps >= Fraction(max_distance, exact) ** (k + 1)
    ):
        k += 1
    return later + exact + k


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (16, 32), (6, 97), (4, 5), (10, 160)]
)
def test_relative_buckets_match_their_definition(num_buckets, max_distance, bidirectional):
    distances = torch.arange(-170, 171)
    buckets = relative_buckets(
        distances,
        num_buckets=num_buckets,
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    expected = [
        _bucket_by_integers(d, num_buckets, max_distance, bidirectional) for d in distances.tolist()
    ]
    assert buckets.tolist() == expected
    assert buckets.dtype == torch.int64
    assert set(buckets.tolist()) <= set(range(num_buckets))


def test_causal_buckets_use_the_whole_table():
    distances = torch.arange(-200, 1)
    causal = relative_buckets(distances, num_buckets=32, max_distance=128, bidirectional=False)
    both = relative_buckets(distances, num_buckets=32, max_distance=128, bidirectional=True)
    assert len(causal.unique()) == 32
    assert len(both.unique()) == 16


def test_relative_buckets_keep_the_shape():
    distances = torch.tensor([[0, 1, -1], [500, -500, 3]])
    buckets = relative_buckets(distances, num_buckets=8, max_distance=16, bidirectional=True)
    assert buckets.tolist() == [[0, 5, 1], [7, 3, 6]]


def test_relative_buckets_reject_bad_sizes():
    distances = torch.arange(3)
    with pytest.raises(ValueError, match=r"even number of at least 4.*num_buckets=7"):
        relative_buckets(distances, num_buckets=7, max_distance=64, bidirectional=True)
    with pytest.raises(ValueError, match=r"at least 2, got num_buckets=1"):
        relative_buckets(distances, num_buckets=1, max_distance=64, bidirectional=False)
    with pytest.raises(ValueError, match=r"max_distance=8 and 8 exact of num_buckets=32"):
        relative_buckets(distances, num_buckets=32, max_distance=8, bidirectional=True)
