"""Every model of the zoo over processes equals itself on one, parameter gradients included."""

import pytest

from tests.parallel import compile_cases, mesh_cases
from tests.parallel.model_cases import CASES
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_model_over_processes_is_the_model(tmp_path_factory, case, world_size):
    check_case(tmp_path_factory, "tests.parallel.model_cases", world_size, case)


@pytest.mark.distributed
@pytest.mark.parametrize("case", mesh_cases.CASES)
def test_data_times_sequence_gives_the_gradient_of_all_tokens(tmp_path_factory, case):
    check_case(tmp_path_factory, "tests.parallel.mesh_cases", 4, case)


@pytest.mark.distributed
@pytest.mark.parametrize("case", compile_cases.CASES)
def test_a_compiled_model_over_processes_is_the_model(tmp_path_factory, case):
    check_case(tmp_path_factory, "tests.parallel.compile_cases", 2, case)
