import numpy as np
import pytest

from longnet_zoo.models import GigaPathSlideConfig, slide_segment_lengths


@pytest.mark.parametrize(
    ("slide_size", "lengths"),
    [
        (262_144, (1024, 5792, 32768, 185363, 1048576)),
        (250_000, (1024, 4870, 23170, 110217, 524288)),
    ],
)
def test_segment_lengths_are_the_published_ones(slide_size, lengths):
    assert slide_segment_lengths(slide_size, 256) == lengths
    config = GigaPathSlideConfig(embed_dim=32, num_layers=1, slide_size=slide_size)
    assert config.pattern.segment_lengths == lengths
    assert config.pattern.dilation_rates == (1, 2, 4, 8, 16)


def test_segment_lengths_follow_the_published_formula():
    for num_tiles_across in (46, 64, 91, 512, 1000, 3001):
        last = int(np.log2(num_tiles_across**2))
        expected = np.power(2.0, np.linspace(10, last, 5)).astype(int).tolist()
        assert list(slide_segment_lengths(100 * num_tiles_across + 99, 100)) == expected


def test_slides_too_small_for_the_formula_are_refused():
    with pytest.raises(ValueError, match="2048 tiles, got 2025 tiles for slide_size=11520 and"):
        slide_segment_lengths(11_520, 256)
    small = {"embed_dim": 32, "num_layers": 1, "slide_size": 11_520}
    with pytest.raises(ValueError, match=r"got 2025 tiles .* Pass segment_lengths"):
        GigaPathSlideConfig(**small)
    config = GigaPathSlideConfig(**small, segment_lengths=[8, 16], dilation_rates=[1, 2])
    assert config.pattern.branches == ((8, 1), (16, 2))
    assert config.segment_lengths == (8, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 48, "num_heads": 8, "grid_size": 0}, ValueError, "grid_size .* got 0"),
        ({"tile_size": 256.0}, TypeError, r"tile_size must be an integer .* got 256\.0"),
        ({"slide_size": -1}, ValueError, "slide_size .* got -1"),
        ({"input_dim": 0}, ValueError, "input_dim .* got 0"),
        ({"num_classes": -2}, ValueError, "num_classes .* at least 0, got -2"),
        ({"norm_eps": 0.0}, ValueError, r"norm_eps must be a positive number, got 0\.0"),
        ({"pool": "max"}, ValueError, "pool must be one of 'cls', 'mean', got 'max'"),
        ({"embed_dim": 30, "num_heads": 2}, ValueError, "multiple of 4 .* got embed_dim=30"),
        ({"dilation_rates": (1, 2)}, ValueError, r"same length, got .* dilation_rates=\(1, 2\)"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        GigaPathSlideConfig(**{"embed_dim": 32, "num_layers": 1, **options})
