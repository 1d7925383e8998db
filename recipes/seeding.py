"""Random numbers that depend on a seed alone, for code that draws from the global generators."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["seeded"]


@contextlib.contextmanager
def seeded(seed: tuple[int, ...]) -> Iterator[None]:
    """Seeds Python, NumPy and PyTorch's CPU generator, and puts their state back at the end.

    Args:
        seed: Whole numbers, 0 or more.
    """
    draws = np.random.SeedSequence(seed).generate_state(3).tolist()
    generator = torch.default_generator
    before = random.getstate(), np.random.get_state(), generator.get_state()
    random.seed(draws[0])
    np.random.seed(draws[1])
    generator.manual_seed(draws[2])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        generator.set_state(before[2])
