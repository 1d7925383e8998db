"""Which share of the data a process takes and counts."""

from types import SimpleNamespace

import pytest

from recipes.data_ranks import counts_samples, data_rank


def trainer(sequence_rank):
    mesh = SimpleNamespace(get_local_rank=lambda: sequence_rank)
    return SimpleNamespace(
        strategy=SimpleNamespace(sequence_mesh=mesh),
        distributed_sampler_kwargs={"num_replicas": 3, "rank": 2},
    )


def test_without_processes_all_data_is_taken():
    assert data_rank(None) == (0, 1)
    assert counts_samples(SimpleNamespace(strategy=None))


@pytest.mark.parametrize("sequence_rank", [0, 1, 2])
def test_processes_of_a_sequence_take_the_same_data_and_one_counts_it(sequence_rank):
    assert data_rank(trainer(sequence_rank)) == (2, 3)
    assert counts_samples(trainer(sequence_rank)) == (sequence_rank == 0)
