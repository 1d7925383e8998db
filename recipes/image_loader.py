"""Batches of images, prepared by timm's transforms.

A batch is a dict: `images` (b, 3, h, w) float32, `labels` (b,) int64, `names`, a list of b, and
`num_skipped`, the files that could not be read for it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .classification_metrics import UNLABELLED
from .image_files import ImageFiles, no_pixel_limit
from .loader import Batch
from .sample_loader import SampleSource, Seed
from .seeding import seeded

__all__ = ["ImageSample", "Transform", "image_source"]

Transform = Callable[[Image.Image], Tensor]


class ImageSample(NamedTuple):
    """An image, before or after it was made a tensor (3, h, w), its class and its name."""

    image: Image.Image | Tensor
    label: int
    name: str


def image_source(images: ImageFiles, transform: Transform) -> SampleSource[ImageSample]:
    """Returns images as loaders take them.

    Args:
        images: The images.
        transform: Makes a tensor of an image; in training at random.
    """
    return SampleSource(
        read=functools.partial(_read, images),
        change=functools.partial(_transformed, transform),
        collate=collate,
        filler=functools.partial(_filler, transform),
        num_samples=len(images),
        unit="images",
    )


def collate(samples: Sequence[ImageSample], *, num_skipped: int = 0) -> Batch:
    """Makes a batch of samples.

    Args:
        samples: With tensors.
        num_skipped: How many could not be read beside them.
    """
    return {
        "images": torch.stack([sample.image for sample in samples]),
        "labels": torch.tensor([sample.label for sample in samples]),
        "names": [sample.name for sample in samples],
        "num_skipped": torch.tensor(num_skipped),
    }


def _read(images: ImageFiles, place: int, seed: Seed) -> ImageSample:
    return ImageSample(images.read(place), images.labels[place], images.names[place])


def _transformed(transform: Transform, sample: ImageSample, place: int, seed: Seed) -> ImageSample:
    with seeded((0, 0, place) if seed is None else seed), no_pixel_limit():
        return sample._replace(image=transform(sample.image))


def _filler(transform: Transform) -> ImageSample:
    """Makes a black image; without a name, so that nobody prints it."""
    shape = transform(Image.new("RGB", (16, 16))).shape
    return ImageSample(torch.zeros(shape), UNLABELLED, "")
