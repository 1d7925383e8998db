"""What holds for every test: seeds, one thread, and uninitialised memory that shows itself."""

import os
import random

# Before torch starts its thread pools, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Asked for by cuBLAS under deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import numpy as np
import pytest
import torch

DISTRIBUTED_TIMEOUT_S = 400


class _TorchRandom:
    """Shows torch's generator to hypothesis as a `random.Random`, so that it seeds each example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


if not torch.cuda.is_available():
    # Before Triton is imported: its kernels then run on CPU tensors, one programme at a time.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps a weak reference only


def pytest_configure(config: pytest.Config) -> None:
    # The order of a sum depends on the number of threads, hence so would the last bits.
    torch.set_num_threads(1)
    hypothesis.register_random(_TORCH_RANDOM)
    # The same examples on every machine; no deadline, since machines differ in speed.
    hypothesis.settings.register_profile(
        "repeatable", derandomize=True, database=None, deadline=None
    )
    # `--hypothesis-profile` on the command line has loaded its own by now.
    if not config.getoption("--hypothesis-profile", None):
        hypothesis.settings.load_profile("repeatable")

    if torch.cuda.is_available():
        _keep_first_tiles()


def _keep_first_tiles() -> None:
    """Compiles each Triton kernel with one tile shape: tests want results, not the fastest one."""
    from longnet_zoo.ops.kernels.triton_tuning import TILES

    for shapes_by_size in TILES.values():
        for shapes in shapes_by_size.values():
            del shapes[1:]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none"))
        if item.get_closest_marker("distributed") and not item.get_closest_marker("timeout"):
            # A process that waits for another one waits for ever.
            item.add_marker(pytest.mark.timeout(DISTRIBUTED_TIMEOUT_S))


@pytest.fixture(autouse=True)
def seed_everything() -> None:
    """Makes a test's random numbers independent of the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fills what `torch.empty` and its kin return with NaN, so that an unwritten output fails.

    PyTorch does so only under deterministic algorithms. `warn_only`, because the kernels under
    test must not be refused; that warning is ignored in `pyproject.toml`.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]
