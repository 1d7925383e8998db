"""The contrastive loss over processes is that of one with all pairs, gradients included."""

import pytest

from tests.parallel.contrastive_cases import CASES
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_pairs_over_processes_are_one_batch(tmp_path_factory, case):
    check_case(tmp_path_factory, "tests.parallel.contrastive_cases", 2, case)
