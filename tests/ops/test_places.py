"""The Hilbert curve: every cell once, neighbours side by side, squares of 4^k cells in one run."""

import pytest
import torch

from longnet_zoo.ops.places import hilbert_positions


def positions_of_square(side):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows, columns], dim=-1)
    return places.reshape(-1, 2), hilbert_positions(places, cell_size=1).reshape(-1)


def test_curve_visits_every_cell_and_steps_to_a_neighbour():
    places, positions = positions_of_square(16)
    assert sorted(positions.tolist()) == list(range(256))
    steps = places[positions.argsort()].diff(dim=0).abs().sum(dim=1)
    assert steps.tolist() == [1] * 255


@pytest.mark.parametrize("side", [2, 4, 8])
def test_runs_of_the_curve_are_squares(side):
    places, positions = positions_of_square(16)
    for run in places[positions.argsort()].split(side**2):
        assert (run.amax(dim=0) - run.amin(dim=0)).tolist() == [side - 1, side - 1]


def test_cells_have_the_size_asked_for():
    _, expected = positions_of_square(3)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3)) * 256.0 + 200.5
    assert torch.equal(hilbert_positions(places, cell_size=256), expected)
    # The whole plane fits, and float64 holds every position.
    corner = torch.tensor([[0, 65535], [65535, 65535]])
    far = hilbert_positions(corner, cell_size=1)
    assert far.dtype == torch.float64
    assert len(set(far.tolist())) == 2
    assert far.max() < 4**16


@pytest.mark.parametrize(
    ("places", "cell_size", "message"),
    [
        (torch.zeros(4, 3), 1, r"places must be \(\.\.\., 2\), .*got \(4, 3\)"),
        (torch.zeros(4, 2), 0, "cell_size must be a positive number, got 0"),
        (torch.tensor([[-1.0, 5.0]]), 2, "got cells from -1 to 2"),
        (torch.tensor([[0.0, 65536.0]]), 1, "got cells from 0 to 65536"),
        (torch.tensor([[0.0, torch.nan]]), 1, "got cells from nan to nan"),
    ],
)
def test_places_that_are_none_are_refused(places, cell_size, message):
    with pytest.raises(ValueError, match=message):
        hilbert_positions(places, cell_size=cell_size)
