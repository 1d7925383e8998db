"""`RingAttention` is one layer, on one process or on many."""

import re

import pytest
import torch

from longnet_zoo.ops.positions import apply_rotary, rotary_tables
from longnet_zoo.parallel.ring_layer import RingAttention
from tests.parallel import part_cases
from tests.parallel.dense import assert_near, dense, visible
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("case", [case.__name__ for case in part_cases.LAYER_CASES])
def test_layer_of_processes(tmp_path_factory, case, world_size):
    check_case(tmp_path_factory, part_cases.__name__, world_size, case)


def test_without_processes_it_is_plain_attention():
    layer = RingAttention(12, 3, num_kv_heads=1, max_lookback=4, layout="zigzag", bias=True)
    x = torch.randn(2, 9, 12)
    q, k, v = (
        project(x).unflatten(-1, (-1, 4)) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    tables = rotary_tables(torch.arange(9), 4)
    q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
    out, _ = dense(q, k, v, visible(2, 9, is_causal=True, max_lookback=4))
    expected = layer.out_proj(out.flatten(2).float())
    assert_near(layer(x), expected.double(), "out")


def test_dropout_is_for_training():
    layer = RingAttention(12, 3, dropout=0.5)
    x = torch.randn(1, 9, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_representation_lists_the_options():
    text = repr(RingAttention(12, 3, layout="striped", max_lookback=7))
    assert "layout='striped'" in text
    assert "max_lookback=7" in text
    assert "ring_size=1" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 13, "heads": 3}, "dim=13 and heads=3"),
        ({"dim_head": 0}, "dim_head must be at least 1, got 0"),
        ({"num_kv_heads": 2}, "heads=3 and num_kv_heads=2"),
        ({"layout": "spiral"}, "got 'spiral'"),
        ({"dropout": 1.5}, "got 1.5"),
        ({"max_lookback": 3, "is_causal": False}, "max_lookback=3 and is_causal=False"),
        ({"backend": "fast"}, "got 'fast'"),
        ({"ring_size": 4}, "ring_size=4 needs that many processes"),
        ({"rotary_base": 0.5}, "got 0.5"),
        ({"dim_head": 3}, "3"),
    ],
)
def test_bad_options_are_refused(options, message):
    sizes = {"dim": 12, "heads": 3} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        RingAttention(sizes.pop("dim"), sizes.pop("heads"), **sizes)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=re.escape("dim=12, got (2, 9, 11)")):
        RingAttention(12, 3)(torch.zeros(2, 9, 11))
