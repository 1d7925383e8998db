"""Position modules: rotary tables whatever the dtype, ALiBi, the learned relative bias."""

import pytest
import torch

from longnet_zoo.layers import AlibiBias, RelativeBias, RotaryEmbedding
from longnet_zoo.ops.positions import relative_buckets, rotary_tables


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tables_do_not_depend_on_the_dtype_of_the_module(dtype):
    positions = torch.tensor([0, 7, 1_048_576])
    expected = rotary_tables(positions, 6, base=500.0)
    tables = RotaryEmbedding(head_dim=6, base=500.0).to(dtype)(positions)
    for table, reference in zip(tables, expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, reference)


def test_rotary_has_no_state():
    assert not RotaryEmbedding(head_dim=6).state_dict()
    assert "head_dim=6, base=10000.0" in repr(RotaryEmbedding(head_dim=6))


def test_rotary_rejects_bad_options():
    with pytest.raises(ValueError, match="head_dim=7"):
        RotaryEmbedding(head_dim=7)
    with pytest.raises(ValueError, match=r"base must be above 1, got 1\.0"):
        RotaryEmbedding(head_dim=6, base=1.0)


def test_alibi_falls_with_the_distance_on_both_sides():
    bias = AlibiBias(num_heads=2)(torch.tensor([-3, 0, 2]))
    expected = [[-3 * 2.0**-4, 0.0, -2 * 2.0**-4], [-3 * 2.0**-8, 0.0, -2 * 2.0**-8]]
    assert bias.tolist() == expected


def test_alibi_is_exact_in_a_half_module():
    module = AlibiBias(num_heads=3)
    distances = torch.arange(-1000, 1000)
    assert torch.equal(module(distances), module.to(torch.bfloat16)(distances))
    assert not module.state_dict()
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        AlibiBias(num_heads=0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_looks_up_its_bucket(bidirectional):
    module = RelativeBias(num_heads=3, num_buckets=8, max_distance=20, bidirectional=bidirectional)
    distances = torch.arange(-30, 31)
    bias = module(distances)
    buckets = relative_buckets(
        distances, num_buckets=8, max_distance=20, bidirectional=bidirectional
    )
    assert bias.shape == (3, 61)
    for head in range(3):
        for column, bucket in enumerate(buckets.tolist()):
            assert bias[head, column] == module.embedding.weight[bucket, head]


def test_relative_bias_table_gets_its_gradient():
    module = RelativeBias(num_heads=2, num_buckets=4, max_distance=5)
    module(torch.tensor([0, 0, 3])).sum().backward()
    # Bucket 0: distance 0, twice. Bucket 3: later keys that are not next.
    assert module.embedding.weight.grad.tolist() == [[2.0, 2.0], [0, 0], [0, 0], [1.0, 1.0]]


def test_relative_bias_rejects_bad_options():
    with pytest.raises(ValueError, match="num_buckets=5"):
        RelativeBias(num_heads=2, num_buckets=5)
    with pytest.raises(ValueError, match="max_distance=8"):
        RelativeBias(num_heads=2, num_buckets=32, max_distance=8)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        RelativeBias(num_heads=0)
