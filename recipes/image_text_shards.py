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
from .shard_files import RowSource
from .shard_hub import HubSource

__all__ = ["PairCollate", "PairDecoder", "ShardConfig", "is_sharded_source", "open_shards"]

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TARS = (".tar", ".tar.gz", ".tgz")
_HUB = "hub:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How shards are read.

    Attributes:
        val: Shards to validate on, as `data.source`; null for none.
        test: Shards to test on; null for none.
        batches_per_epoch: Batches that count as an epoch.
        shuffle: Samples that each worker holds in memory and mixes; 0 keeps their order.
        max_eval_samples: Takes so many held-out pairs at most; null takes all.
    """

    val: str | None = None
    test: str | None = None
    batches_per_epoch: int = 1000
    shuffle: int = 1000
    max_eval_samples: int | None = None


def is_sharded_source(source: str) -> bool:
    """Returns whether a source names shards; see `open_shards`."""
    return source.startswith(_HUB) or source.endswith((*_TARS, ".parquet"))


def open_shards(source: str) -> str | RowSource:
    """Returns what the loaders of shards take.

    Args:
        source: Tar shards, "data/train-{000000..000999}.tar"; `.parquet` files, also with
            wildcards; or "hub:NAME" or "hub:NAME:SPLIT", a dataset of the Hugging Face Hub.
    """
    if source.startswith(_HUB):
        name, _, split = source.removeprefix(_HUB).partition(":")
        return HubSource(name, split=split or "train")
    if source.endswith(".parquet"):
        return HubSource("parquet", data_files=source)
    return source


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
        content = sample.first(*_IMAGES, self.columns.image)
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
        record = json.loads(found) if "json" in sample else {key: found}
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
