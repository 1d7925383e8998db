"""Pairs from shards: tar files as webdataset lays them out, or a Hugging Face dataset, streamed.

In a tar file a sample has an image as `.jpg`, `.jpeg`, `.png` or `.webp`, and beside it its caption
as `.txt`, or `.json` with a key that holds it. In a dataset both are columns.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from .image_files import read_image
from .image_text_loader import PairEncoder, collate_pairs
from .image_text_sources import TableColumns
from .loader import Batch

__all__ = ["PairCollate", "PairDecoder"]

_IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairDecoder:
    """Makes a sample for a model of a shard's sample.

    Attributes:
        encoder: Makes tensors of image and caption.
        columns: Columns of a dataset, and key of the caption in a `.json`.
        max_pixels: An image with more is refused.
        is_training: Whether the encoder draws anew each time, from NumPy's generator.
    """

    encoder: PairEncoder
    columns: TableColumns
    max_pixels: int
    is_training: bool

    def __call__(self, sample: Any) -> dict[str, Any]:
        """Returns what the encoder makes.

        Raises:
            ValueError: A part is missing, or is not what it should be.
            OSError: The image cannot be read.
        """
        content = sample.file(*_IMAGES, self.columns.image)
        caption = self._caption(sample).strip()
        if not caption:
            raise ValueError("its caption is empty")
        image = read_image(_Content(content), max_pixels=self.max_pixels)
        # Seeded for each sample and epoch.
        seed = (np.random.randint(2**31),) if self.is_training else (0,)
        return self.encoder(image, caption, name=sample["__key__"], seed=seed)

    def _caption(self, sample: Any) -> str:
        key = self.columns.caption
        found = sample.first("txt", "json", key)
        if "txt" in sample:
            # Not UTF-8 is a ValueError, too.
            return found.decode("utf-8")
        try:
            record = json.loads(found) if "json" in sample else {key: found}
        except RecursionError as error:
            raise ValueError(f"its json is none: {error}") from error
        caption = record.get(key) if isinstance(record, dict) else None
        if not isinstance(caption, str):
            raise ValueError(f"it needs text under {key!r}, got {record!r}"[:200])
        return caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCollate:
    """Makes a batch of what `PairDecoder` returns; the loader counts what was skipped.

    Attributes:
        pad_id: Token id that fills up.
    """

    pad_id: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Returns the batch."""
        return collate_pairs(samples, pad_id=self.pad_id)


class _Content(io.BytesIO):
    """An image in memory, as errors name it; the loader adds of which sample."""

    def __repr__(self) -> str:
        return "its image"
