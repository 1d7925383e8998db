"""How shards are named and read: webdataset's tar files, or Hugging Face datasets."""

import dataclasses

from .shard_files import RowSource
from .shard_hub import HubSource

__all__ = ["HeldOutShardConfig", "ShardConfig", "is_sharded", "is_tar", "open_shards"]

_HUB = "hub:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How shards are read.

    Attributes:
        batches_per_epoch: Batches that count as an epoch.
        shuffle: Samples that each worker holds in memory and mixes; 0 keeps their order.
        max_eval_samples: Takes so many held-out samples at most; null takes all.
    """

    batches_per_epoch: int = 1000
    shuffle: int = 1000
    max_eval_samples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutShardConfig(ShardConfig):
    """How shards are read, and which are held out.

    Attributes:
        val: Shards to validate on, as `data.source`; null for none.
        test: Shards to test on; null for none.
        batches_per_epoch: Batches that count as an epoch.
        shuffle: Samples that each worker holds in memory and mixes; 0 keeps their order.
        max_eval_samples: Takes so many held-out samples at most; null takes all.
    """

    val: str | None = None
    test: str | None = None


def is_tar(source: str) -> bool:
    """Returns whether a source names tar shards."""
    return source.endswith((".tar", ".tar.gz", ".tgz"))


def is_sharded(source: str) -> bool:
    """Returns whether a source names shards; see `open_shards`."""
    return is_tar(source) or source.startswith(_HUB) or source.endswith(".parquet")


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
