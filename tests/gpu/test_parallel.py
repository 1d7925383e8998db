"""Sequences over two ranks that share a GPU; NCCL wants a GPU for each, which few have at hand."""

import pytest

from tests.parallel.gpu_cases import CASES
from tests.parallel.torchrun import check_case

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]


@pytest.mark.parametrize("case", CASES)
def test_parts_on_a_gpu_equal_the_whole(tmp_path_factory, case):
    check_case(tmp_path_factory, "tests.parallel.gpu_cases", 2, case)
