"""Batches of images, prepared by timm's transforms, in an order that resumes anywhere.

A batch is a dict: `images` (b, 3, h, w) float32, `labels` (b,) int64, `names`, a list of b, and
`num_skipped`, the files that could not be read for it. What an image looks like depends on seed,
epoch and the image alone, so the number of worker processes changes nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .classification_metrics import UNLABELLED
from .image_files import ImageFiles, no_pixel_limit
from .loader import (
    FILLER,
    Batch,
    EpochOrder,
    FixedLoader,
    OnError,
    SeededLoader,
    SkippingReader,
    fair_order,
)
from .seeding import seeded

__all__ = ["EvalImages", "TrainImages"]

Transform = Callable[[Image.Image], Tensor]


class TrainImages(SeededLoader):
    """Yields epoch after epoch, each in an order that depends on seed and epoch.

    Args:
        images: The images.
        transform: Makes a tensor of an image, at random.
        batch_size: Images in a batch, for each rank.
        seed: Seed of the order and of the transform.
        on_error: "skip" takes the next image for one that cannot be read; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share an epoch.
        repeat: Batches, or share of an epoch, to repeat over and over
            (`Trainer.overfit_batches`); 0 for what all others want.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.

    Raises:
        ValueError: There are fewer images than one step takes.
    """

    def __init__(
        self,
        images: ImageFiles,
        *,
        transform: Transform,
        batch_size: int,
        seed: int = 0,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        repeat: int | float = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            _TrainBatches(images, transform=transform, seed=seed, on_error=on_error),
            num_samples=len(images),
            unit="images",
            order={"num_images": len(images)},
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            repeat=repeat,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class EvalImages(FixedLoader):
    """Yields every image once, in an order that is mixed but always the same.

    So a limit on the number of batches takes a fair sample. Every rank gets as many batches, and
    where images are missing, one that counts for nothing.

    Args:
        images: The images.
        transform: Makes a tensor of an image.
        batch_size: Images in a batch, for each rank; the last batch may hold fewer.
        is_mixed: Whether to mix the order.
        on_error: "skip" leaves an image that cannot be read out of account; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share the images.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.
    """

    def __init__(
        self,
        images: ImageFiles,
        *,
        transform: Transform,
        batch_size: int,
        is_mixed: bool = True,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            _EvalBatches(images, transform=transform, on_error=on_error),
            fair_order(len(images)) if is_mixed else range(len(images)),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class _Batches(Dataset[Batch]):
    """Reads and transforms images; what a request is, a subclass says."""

    def __init__(self, images: ImageFiles, *, transform: Transform, on_error: OnError) -> None:
        self._images, self._transform = images, transform
        self._reader = SkippingReader(
            images.read, num_samples=len(images), unit="images", on_error=on_error
        )

    def _tensor(self, image: Image.Image, *, seed: tuple[int, ...]) -> Tensor:
        with seeded(seed), no_pixel_limit():
            return self._transform(image)


class _TrainBatches(_Batches):
    """Makes the batch of a request (epoch, first place in the epoch's order, number of images)."""

    def __init__(self, images: ImageFiles, *, seed: int, **options: Any) -> None:
        super().__init__(images, **options)
        self._seed = seed
        self._order = EpochOrder(len(images), seed=seed)

    def __getitem__(self, request: tuple[int, int, int]) -> Batch:
        epoch, first, count = request
        chosen = self._order.samples(epoch, first=first, count=count)
        tensors, places, skipped = [], [], 0
        for index in chosen:
            place, image, number = self._reader.read_from(index)
            tensors.append(self._tensor(image, seed=(self._seed, epoch, place)))
            places.append(place)
            skipped += number
        return _batch(self._images, tensors, places, num_skipped=skipped)


class _EvalBatches(_Batches):
    """Makes the batch of a request, a list of places."""

    def __getitem__(self, request: list[int]) -> Batch:
        read = [None if place == FILLER else self._read(place) for place in request]
        shape = next((tensor.shape for tensor in read if tensor is not None), None)
        if shape is None:
            shape = self._transform(Image.new("RGB", (16, 16))).shape
        places = [FILLER if tensor is None else i for i, tensor in zip(request, read, strict=True)]
        tensors = [torch.zeros(shape) if tensor is None else tensor for tensor in read]
        skipped = sum(i != place for i, place in zip(request, places, strict=True))
        return _batch(self._images, tensors, places, num_skipped=skipped)

    def _read(self, place: int) -> Tensor | None:
        image = self._reader.read(place)
        return None if image is None else self._tensor(image, seed=(0, 0, place))


def _batch(
    images: ImageFiles, tensors: list[Tensor], places: list[int], *, num_skipped: int
) -> Batch:
    labels = [UNLABELLED if place == FILLER else images.labels[place] for place in places]
    return {
        "images": torch.stack(tensors),
        "labels": torch.tensor(labels),
        # Fillers have no name, so nobody prints them.
        "names": ["" if place == FILLER else images.names[place] for place in places],
        "num_skipped": torch.tensor(num_skipped),
    }
