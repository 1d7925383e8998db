"""Dilated attention over processes equals that of one: out, LSE and every gradient, a sum loss."""

import pytest

from tests.parallel import triton_cases
from tests.parallel.dilated_cases import CASES
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_parts_equal_the_whole(tmp_path_factory, case, world_size):
    check_case(tmp_path_factory, "tests.parallel.dilated_cases", world_size, case)


@pytest.mark.distributed
@pytest.mark.parametrize("case", triton_cases.CASES)
def test_parts_by_triton_equal_the_whole(tmp_path_factory, case):
    check_case(tmp_path_factory, "tests.parallel.triton_cases", 2, case)
