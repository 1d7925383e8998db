"""Processes whose batches have different modalities neither wait for ever nor differ."""

import pytest

from tests.parallel.multimodal_cases import CASES
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_modality_that_a_rank_lacks_has_a_gradient_of_zero(tmp_path_factory, case):
    check_case(tmp_path_factory, "tests.parallel.multimodal_cases", 2, case)
