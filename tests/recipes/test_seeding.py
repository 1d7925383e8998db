import random

import numpy as np
import torch

from recipes.seeding import seeded


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_depend_on_the_seed_alone_and_the_generators_are_put_back():
    outside = draws()
    with seeded((1, 2)):
        first = draws()
    between = draws()
    with seeded((1, 2)):
        assert draws() == first
    with seeded((1, 3)):
        assert all(a != b for a, b in zip(draws(), first, strict=True))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert [draws(), draws()] == [outside, between]


def test_the_generators_are_put_back_after_an_error():
    before = torch.get_rng_state()
    try:
        with seeded((1,)):
            torch.rand(3)
            raise OSError
    except OSError:
        pass
    assert torch.equal(torch.get_rng_state(), before)
