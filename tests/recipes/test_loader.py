"""Who gets which samples, shown on a dataset that hands back what it was asked for."""

import itertools
import math
import os
import signal

import pytest

from recipes.loader import (
    FILLER,
    EpochOrder,
    FixedLoader,
    SeededLoader,
    batch_iterator,
    fair_order,
)


class Echo:
    def __getitem__(self, request):
        return list(request)


def fixed(num_samples, *, batch_size, world_size):
    """Returns the batches of each rank."""
    options = {"batch_size": batch_size, "num_workers": 0, "pin_memory": False}
    return [
        list(FixedLoader(Echo(), range(num_samples), rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]


def seeded(**options):
    defaults = {"batch_size": 2, "seed": 0, "rank": 0, "world_size": 1, "repeat": 0}
    workers = {"num_workers": 0, "pin_memory": False}
    return SeededLoader(
        Echo(), num_samples=11, unit="numbers", order={}, **workers, **(defaults | options)
    )


class Process:
    def __getitem__(self, request):
        return os.getpid()


def test_workers_outlive_the_signal_that_lets_a_training_save():
    batches = batch_iterator(Process(), range(9), num_workers=1, pin_memory=False)
    worker = next(batches)
    os.kill(worker, signal.SIGTERM)
    assert [*batches] == [worker] * 8 != [os.getpid()] * 8


def take(loader, number):
    return list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), number))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 12])
def test_ranks_get_as_many_batches_and_each_sample_once(num_samples, batch_size, world_size):
    ranks = fixed(num_samples, batch_size=batch_size, world_size=world_size)
    per_rank = math.ceil(num_samples / world_size)
    sizes = [min(batch_size, per_rank - i) for i in range(0, per_rank, batch_size)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [sizes] * world_size
    seen = [sample for batches in ranks for batch in batches for sample in batch]
    missing = per_rank * world_size - num_samples
    assert sorted(seen) == [FILLER] * missing + list(range(num_samples))


def test_fillers_come_last():
    assert fixed(7, batch_size=2, world_size=3) == [
        [[0, 3], [6]],
        [[1, 4], [FILLER]],
        [[2, 5], [FILLER]],
    ]


def test_no_samples_are_no_batches():
    assert fixed(0, batch_size=2, world_size=2) == [[], []]


def test_fair_order_is_mixed_and_always_the_same():
    order = fair_order(11)
    assert order == fair_order(11) != sorted(order)
    assert sorted(order) == list(range(11))


def test_epoch_order_follows_seed_and_epoch():
    order = EpochOrder(11, seed=3)
    epochs = [order.samples(epoch, first=0, count=11) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert EpochOrder(11, seed=4).samples(0, first=0, count=11) != epochs[0]
    assert order.samples(1, first=3, count=2) == epochs[1][3:5]


def test_ranks_take_neighbouring_places_of_a_step():
    ranks = [take(seeded(rank=rank, world_size=2), 3) for rank in (0, 1)]
    assert ranks == [[[0, 0, 2], [0, 4, 2], [1, 0, 2]], [[0, 2, 2], [0, 6, 2], [1, 2, 2]]]


@pytest.mark.parametrize(("repeat", "number"), [(1, 1), (3, 3), (0.5, 3), (1.0, 5), (99, 5)])
def test_the_first_batches_can_be_repeated(repeat, number):
    places = [[0, 2 * batch, 2] for batch in range(number)]
    assert take(seeded(repeat=repeat), 2 * number) == places * 2


def test_without_repetition_epoch_follows_epoch():
    for repeat in (0, 0.0):
        assert take(seeded(repeat=repeat), 6)[4:] == [[0, 8, 2], [1, 0, 2]]


def test_an_epoch_must_fill_a_step():
    message = (
        "batch_size=4 on 3 processes takes 12 numbers, got 11 for training. Use a smaller "
        "batch_size, or more numbers"
    )
    with pytest.raises(ValueError, match=message):
        seeded(batch_size=4, world_size=3)


def test_other_processes_with_the_same_steps_go_on_without_a_warning():
    saved = seeded(batch_size=1, world_size=2).state_dict() | {"position": 3}
    loader = seeded(batch_size=2, world_size=1)
    loader.load_state_dict(saved)
    assert next(iter(loader)) == take(seeded(batch_size=2, world_size=1), 4)[3]
    with pytest.warns(UserWarning, match="world_size 2 -> 1"):
        seeded(batch_size=1, world_size=1).load_state_dict(saved)
