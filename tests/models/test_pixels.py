"""Images that are read in strips."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longnet_zoo.models import SlidePixels
from tests.models.small_vision import PATCH, make

ROOT = Path(__file__).parents[2]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


class RecordedPixels:
    """Shows an array, and remembers how much was read at once."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape
        self.parts = []

    def __getitem__(self, key):
        part = self.array[key]
        self.parts.append(part.shape)
        return part


class Slide:
    """Like openslide.OpenSlide: three levels, corners in pixels of level 0, sizes of the level."""

    level_downsamples = (1.0, 2.0, 4.0)

    def __init__(self, array):
        self.levels = [array[::step, ::step] for step in (1, 2, 4)]
        self.level_dimensions = tuple(level.shape[1::-1] for level in self.levels)

    def read_region(self, location, level, size):
        step = int(self.level_downsamples[level])
        left, top = location[0] // step, location[1] // step
        part = self.levels[level][top : top + size[1], left : left + size[0]]
        return Image.fromarray(part).convert("RGBA")


def random_pixels(height=28, width=20, channels=3):
    return np.random.default_rng(0).integers(256, size=(height, width, channels), dtype=np.uint8)


def whole_image(pixels):
    scaled = torch.tensor(pixels) / 255
    return ((scaled - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("strip_patches", [1, 2, 3, 7, 100])
def test_strips_equal_the_whole_image_and_are_small(strip_patches):
    model, array = make(), random_pixels()
    pixels = RecordedPixels(array)
    with torch.no_grad():
        found = model.embed_pixels(pixels, mean=MEAN, std=STD, strip_patches=strip_patches)
        expected = model.embed(whole_image(array))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    rows = strip_patches * PATCH
    assert pixels.parts == [(min(rows, 28 - top), 20, 3) for top in range(0, 28, rows)]


def test_other_sizes_get_interpolated_positions():
    model, array = make(), random_pixels(36, 12)
    found = model.embed_pixels(array, mean=MEAN, std=STD)
    torch.testing.assert_close(found, model.embed(whole_image(array)), atol=1e-6, rtol=1e-6)


def test_floating_pixels_are_in_zero_to_one():
    model, array = make(), random_pixels()
    for dtype in (np.float32, np.float64):
        found = model.embed_pixels((array / 255).astype(dtype))
        torch.testing.assert_close(found, model.embed_pixels(array), atol=1e-6, rtol=1e-6)


def test_default_normalisation_is_that_of_imagenet():
    model, array = make(), random_pixels()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert torch.equal(model.embed_pixels(array), model.embed_pixels(array, mean=mean, std=std))
    assert model.pretrained_cfg["mean"] == mean
    assert model.pretrained_cfg["std"] == std


def test_memory_map_and_part_of_it(tmp_path):
    model, array = make(), random_pixels(31, 22)
    np.save(tmp_path / "slide.npy", array)
    pixels = np.load(tmp_path / "slide.npy", mmap_mode="r")
    found = model.embed_pixels(pixels, size=(28, 20))
    assert torch.equal(found, model.embed_pixels(array[:28, :20]))


def test_model_of_other_precision_gets_its_dtype():
    model = make().to(torch.bfloat16)
    assert model.embed_pixels(random_pixels()).dtype == torch.bfloat16


def test_backward_pass_reads_the_strips_again_and_keeps_none():
    model, pixels = make(), RecordedPixels(random_pixels())
    tokens = model.embed_pixels(pixels, strip_patches=2)
    assert len(pixels.parts) == 4
    tokens.sum().backward()
    assert len(pixels.parts) == 8
    model.patch_embed.requires_grad_(False)
    model.embed_pixels(pixels, strip_patches=2).sum().backward()
    assert len(pixels.parts) == 12


@pytest.mark.parametrize("level", [0, 1, 2])
def test_slide_is_read_by_level(level):
    array = random_pixels(4 * 28, 4 * 20)
    pixels = SlidePixels(Slide(array), level=level)
    expected = array[:: 2**level, :: 2**level]
    assert pixels.shape == expected.shape
    assert np.array_equal(pixels[4:9, 3:17], expected[4:9, 3:17])
    model = make()
    found = model.embed_pixels(pixels, size=(28, 20))
    assert torch.equal(found, model.embed_pixels(expected[:28, :20]))


@pytest.mark.parametrize("key", [(0, 0), 3, (slice(0, 8, 2), slice(0, 4))], ids=str)
def test_slides_are_read_by_two_slices(key):
    with pytest.raises(TypeError, match=r"pixels\[top:bottom, left:right\], got"):
        SlidePixels(Slide(random_pixels()))[key]


def test_slide_without_the_level_is_refused():
    slide = Slide(random_pixels())
    for level in (3, -1):
        with pytest.raises(ValueError, match=rf"level must be in \[0, 3\), .* got {level}"):
            SlidePixels(slide, level=level)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"pixels": Image.new("RGB", (20, 28))}, TypeError, "got Image. Use numpy.asarray"),
        ({"pixels": random_pixels()[..., 0]}, ValueError, r"in_chans\), got \(28, 20\)"),
        ({"pixels": random_pixels(channels=4)}, ValueError, r"\(28, 20, 3\), got \(28, 20, 4\)"),
        ({"pixels": random_pixels(30)}, ValueError, "patch_size=4, got 30 x 20"),
        ({"pixels": random_pixels().astype(np.int32)}, TypeError, "got torch.int32"),
        ({"size": (28, 24)}, ValueError, r"within the 28 x 20 pixels, got \(28, 24\)"),
        ({"size": (0, 20)}, ValueError, r"got \(0, 20\)"),
        ({"mean": (0.5,)}, ValueError, r"mean .* in_chans=3, got \(0.5,\)"),
        ({"std": (0.5, 0.5)}, ValueError, r"std .* in_chans=3, got \(0.5, 0.5\)"),
        ({"mean": 0.5}, ValueError, "mean .* in_chans=3, got 0.5"),
        ({"mean": "abc"}, TypeError, "mean must be a sequence of numbers, got 'abc'"),
        ({"std": (0.5, 0, 1)}, ValueError, r"std must be above 0, got \(0.5, 0, 1\)"),
        ({"size": 64}, TypeError, "size must be two integers, .* got 64"),
        ({"size": (28, 20, 3)}, TypeError, r"got \(28, 20, 3\)"),
        ({"pixels": random_pixels().astype(np.float32)}, ValueError, r"\[0, 1\], .* to 255"),
        ({"strip_patches": 0}, ValueError, "strip_patches .* got 0"),
        ({"strip_patches": 1.5}, ValueError, "strip_patches .* got 1.5"),
    ],
)
def test_bad_pixels_are_refused(options, error, match):
    options = {"pixels": random_pixels(), **options}
    with pytest.raises(error, match=match):
        make().embed_pixels(options.pop("pixels"), **options)


LARGE_IMAGE = """
import resource
import numpy as np
import torch
from longnet_zoo.factory import create_model

class Lazy:
    shape = (16384, 16384, 3)
    def __getitem__(self, key):
        sizes = [part.stop - part.start for part in key]
        return np.full((*sizes, 3), key[0].start % 251, dtype=np.uint8)

sizes = dict(embed_dim=2, num_layers=1, num_heads=1, segment_lengths=(64,), dilation_rates=(1,))
model = create_model("longvit_small_patch32_16384", **sizes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    tokens = model.embed_pixels(Lazy(), strip_patches=4)
assert tokens.shape == (1, 512 * 512, 2)
assert tokens.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_large_image_never_exists_as_one_tensor():
    done = subprocess.run(
        [sys.executable, "-c", LARGE_IMAGE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Kibibytes; the image in float32 would be 3.2 GB, and 0.8 GB in uint8.
    assert int(done.stdout) < 400_000
