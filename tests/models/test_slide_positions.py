import numpy as np
import pytest
import torch

from longnet_zoo.models.slide_positions import grid_cells, sincos_positions


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_cells_are_exact_at_their_borders(dtype):
    for tile_size in (256, 300):
        cells = torch.tensor([[0, 1], [999, 500], [3, 998]])
        corners = cells * tile_size
        assert torch.equal(grid_cells(corners.to(dtype), tile_size), cells)
        assert torch.equal(grid_cells((corners + tile_size - 1).to(dtype), tile_size), cells)
    assert grid_cells(torch.tensor([-0.5, 255.9]), 256).tolist() == [-1, 0]


def test_positions_are_those_of_a_table_of_the_whole_grid():
    grid_size, embed_dim = 13, 20
    # Masked autoencoders' table: the fast index, y, has the first half of the channels.
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 4) / (embed_dim / 4))
    x, y = np.divmod(np.arange(grid_size**2), grid_size)
    halves = [f(np.outer(axis, omega)) for axis in (y, x) for f in (np.sin, np.cos)]
    expected = np.concatenate(halves, axis=1).astype(np.float32)
    cells = torch.from_numpy(np.stack([x, y], axis=1))
    found = sincos_positions(cells, embed_dim, grid_size=grid_size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-7, rtol=0)
    again = sincos_positions(cells.reshape(13, 13, 2), embed_dim, grid_size=50)
    assert torch.equal(again.flatten(0, 1), found)


def test_angles_are_float64_whatever_the_default_dtype():
    cells = torch.tensor([[99_999, 7]])
    plain = sincos_positions(cells, 8, grid_size=100_000)
    expected = np.sin([99_999.0, 999.99])  # cell_x at the frequencies 1 and 0.01
    assert plain[0, 4:6].tolist() == pytest.approx(expected, abs=1e-7)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(sincos_positions(cells, 8, grid_size=100_000), plain)
    finally:
        torch.set_default_dtype(torch.float32)
