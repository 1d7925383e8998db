import hashlib

import numpy as np
import pytest
import torch

import recipes.slide_demo as slide_demo
from recipes.slide_demo import DEMO_CLASSES, TILE_SIZE, DemoSlides, label_of_window

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def parts():
    return {split: DemoSlides(split) for split in SPLITS}


def test_the_slide_is_the_one_that_its_provenance_names():
    folder = slide_demo._SLIDE.parent
    digest = hashlib.sha256(slide_demo._SLIDE.read_bytes()).hexdigest()
    assert digest in (folder / "PROVENANCE.md").read_text()
    assert "CC0 1.0" in (folder / "LICENSE").read_text()


def test_label_is_the_quadrant_with_most_stain():
    density = np.zeros((4, 6))
    for label, (row, column) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        density[:] = 1
        density[row + 1, column + 2] = 4
        assert label_of_window(density) == (label, 9 / 6)


@pytest.mark.parametrize("split", SPLITS)
def test_the_label_follows_from_tiles_and_positions(parts, split):
    """The first stain's mean, channel 12, summed over the tiles of each quadrant."""
    slides, middle = parts[split], slide_demo._WINDOW * TILE_SIZE / 2
    scale, shift = haematoxylin()
    for index in range(0, len(slides.labels), len(slides.labels) // 40):
        slide = slides[index]
        density = slide.tiles[:, 12] * scale + shift
        quadrant = (slide.coords[:, 0] >= middle) + 2 * (slide.coords[:, 1] >= middle)
        sums = torch.bincount(quadrant, weights=density, minlength=4)
        assert slide.label == slides.labels[index] == int(sums.argmax())


def haematoxylin():
    """Undoes the standardisation: two tiles give scale and shift."""
    grid = slide_demo._tile_grid()
    rows, columns = np.nonzero(grid.tissue)
    x, y = grid.statistics[rows, columns, 12], grid.density[rows, columns]
    scale = (y[1] - y[0]) / (x[1] - x[0])
    return float(scale), float(y[0] - scale * x[0])


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_equal_and_positions_decide(parts, split):
    slides = parts[split]
    assert len(set(np.bincount(slides.labels))) == 1
    window = [slides[8 + orientation] for orientation in range(8)]
    assert {slide.label for slide in window} == set(range(len(DEMO_CLASSES)))
    for slide in window:
        assert torch.equal(slide.tiles.sort(0).values, window[0].tiles.sort(0).values)


def test_there_are_eight_orientations():
    grid = np.arange(9).reshape(3, 3)
    assert len({slide_demo._turn(grid, number).tobytes() for number in range(8)}) == 8


def test_glass_is_left_out_and_statistics_are_standardised(parts):
    lengths = {len(parts["train"][i].tiles) for i in range(0, 4000, 40)}
    assert len(lengths) > 5
    assert max(lengths) <= slide_demo._WINDOW**2
    tiles = torch.cat([parts["train"][i].tiles for i in range(0, len(parts["train"].labels), 64)])
    assert tiles.shape[1] == DemoSlides.input_dim
    assert tiles.mean(0).abs().max() < 0.5
    assert tiles.std(0).min() > 0.5


def test_parts_do_not_overlap(parts):
    rows = {split: [row for row, _ in slides._windows] for split, slides in parts.items()}
    assert min(rows["val"]) - max(rows["train"]) >= 2 * slide_demo._WINDOW
    assert min(rows["test"]) - max(rows["val"]) > slide_demo._WINDOW


def test_coordinates_are_pixels_inside_the_window(parts):
    coords = parts["val"][0].coords
    assert not (coords % TILE_SIZE).any()
    assert 0 <= coords.min() <= coords.max() < slide_demo._WINDOW * TILE_SIZE
    assert len(coords.unique(dim=0)) == len(coords)
