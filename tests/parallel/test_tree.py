"""Tree attention equals dense attention to the keys of all ranks."""

import re

import pytest
import torch

from longnet_zoo.parallel.tree import tree_attention
from tests.parallel import part_cases
from tests.parallel.dense import assert_near, dense
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("case", [case.__name__ for case in part_cases.TREE_CASES])
def test_tree_of_processes(tmp_path_factory, case, world_size):
    check_case(tmp_path_factory, part_cases.__name__, world_size, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process_attends_by_itself(dtype):
    q, (k, v) = torch.randn(2, 2, 4, 8).to(dtype), torch.randn(2, 2, 7, 2, 8).to(dtype)
    seen = torch.ones(2, 2, 7, dtype=torch.bool)
    out, lse = tree_attention(q, k, v, None, return_lse=True)
    expected, expected_lse = dense(q, k, v, seen)
    assert out.dtype == lse.dtype == dtype
    assert_near(out, expected, "out")
    assert_near(lse, expected_lse, "lse")
    scaled = tree_attention(2 * q, k, v, None, scale=0.5 * 8**-0.5)
    assert_near(scaled, expected, "scale")


def test_bad_input_is_refused():
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 5, 2, 8)
    with pytest.raises(ValueError, match=re.escape("q (1, 1, 4, 8), k (1, 5, 2, 8) and v (1, 5")):
        tree_attention(q, k, k[..., :4], None)
    with pytest.raises(ValueError, match=re.escape("q (1, 1, 4, 8), k (2, 5, 2, 8)")):
        tree_attention(q, k.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), None)
    with pytest.raises(ValueError, match="got 4 and 3"):
        tree_attention(q, k[:, :, [0, 0, 0]], k[:, :, [0, 0, 0]], None)
    with pytest.raises(TypeError, match=r"float32, torch\.float64"):
        tree_attention(q, k.double(), k, None)
    with pytest.raises(ValueError, match=re.escape("(1, 5), got torch.bool (1, 4)")):
        tree_attention(q, k, k, None, key_padding_mask=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="no gradient, got inputs that require one"):
        tree_attention(q.requires_grad_(), k, k, None)
    with torch.no_grad():
        assert tree_attention(q, k, k, None).shape == q.shape
