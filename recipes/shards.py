"""Loaders over shards: tar files as webdataset lays them out, or Hugging Face `datasets`.

    def decode(sample):                      # raises ValueError or OSError where it is damaged
        return {"images": to_tensor(sample.first("jpg", "png")), "texts": sample["txt"].decode()}

    loader = ShardLoader("data/train-{000000..000999}.tar", decode, batch_size=64, seed=0)

A sample is a dict of extension -> bytes (of Hugging Face datasets: column -> value), with `__key__`
and `__url__`. A part that is missing raises ValueError by itself. A batch is what `collate` makes,
and `num_skipped`: what was skipped while it was made, where a shard that cannot be read (any
further) counts once. Every such sample or shard is one line of the log.
"""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate

from .data_options import check_least, check_on_error
from .loader import FILLER, Batch, EndlessLoader, FixedLoader, OnError, batch_iterator
from .shard_files import RowSource, TarSource
from .shard_streaming import (
    Collate,
    Decode,
    Item,
    SampleDecoder,
    ShardStreams,
    StreamPosition,
    read_items,
)

__all__ = ["ShardEvalLoader", "ShardLoader"]


class ShardLoader(EndlessLoader):
    """Yields training batches without end; an epoch is a number of batches, chosen freely.

    All ranks get as many batches, whatever is in their shards. `state_dict` must be called on all
    of them at once, as Lightning does: it holds the positions of all ranks.

    Args:
        urls: Tar shards, as `find_shards` takes them, or a source of another kind.
        decode: Makes a dict of what a sample holds. It may draw from the generators of Python,
            NumPy and PyTorch, which are seeded for each sample and epoch.
        batch_size: Samples in a batch, for each rank.
        collate: Makes a batch, a dict, of a list of what `decode` returns.
        batches_per_epoch: Batches that Lightning takes for an epoch.
        seed: Seed of the order and of what `decode` draws.
        shuffle: Samples that each stream holds in memory, undecoded, and mixes; 0 keeps shards and
            samples in their order.
        on_error: "skip" takes the next sample for one that cannot be used; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share the shards.
        num_workers: Worker processes; 0 reads in this one.
        num_streams: Streams that the shards are dealt out to, a multiple of ranks times workers;
            None takes one for each. With the same number another number of ranks or workers goes
            on with the same batches.
        pin_memory: Whether batches go to page-locked memory.

    Raises:
        ValueError: An option is out of range, or there are no shards.
    """

    def __init__(
        self,
        urls: str | Sequence[str] | RowSource,
        decode: Decode,
        *,
        batch_size: int,
        collate: Collate = default_collate,
        batches_per_epoch: int = 1000,
        seed: int = 0,
        shuffle: int = 1000,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        num_streams: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_least(batch_size=(batch_size, 1), batches_per_epoch=(batches_per_epoch, 1))
        check_least(shuffle=(shuffle, 0), seed=(seed, 0), num_workers=(num_workers, 0))
        check_on_error(on_error)
        readers = world_size * max(1, num_workers)
        num_streams = readers if num_streams is None else num_streams
        if num_streams < 1 or num_streams % readers:
            raise ValueError(
                "num_streams must be a multiple of world_size * num_workers, got num_streams="
                f"{num_streams}, world_size={world_size} and num_workers={num_workers}. Pass a "
                f"multiple of {readers}."
            )
        source = _source(urls)
        super().__init__(
            num_batches=batches_per_epoch,
            position={"num_batches": 0, "streams": _first_positions(num_streams, unit=0)},
            order={
                "shards": _fingerprint(source.shards),
                "seed": seed,
                "shuffle": shuffle,
                "num_streams": num_streams,
                # Not `batch_size`: the same step on other ranks would take other samples.
                "samples_per_batch": batch_size,
            },
        )
        self._dataset = ShardStreams(
            source,
            decoder=SampleDecoder(decode, on_error=on_error, seed=seed),
            collate=collate,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            num_streams=num_streams,
            rank=rank,
            world_size=world_size,
        )
        self._rank, self._world_size, self._num_streams = rank, world_size, num_streams
        self._workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position behind the last batch handed over, of the streams of all ranks."""
        state = super().state_dict()
        if self._world_size > 1 and dist.is_available() and dist.is_initialized():
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, (self._rank, state["position"]["streams"]))
            # A rank knows about its own streams only.
            own = dict(found)
            streams = [own[i % self._world_size][i] for i in range(self._num_streams)]
            state["position"] = {**state["position"], "streams": streams}
        return state

    def _open(self) -> Iterator[tuple[Batch, int, dict[str, int]]]:
        positions = [StreamPosition(**position) for position in self._position["streams"]]
        self._dataset.start_at(self._position["num_batches"] // self._world_size, positions)
        return batch_iterator(self._dataset, None, **self._workers)

    def _step(self, item: tuple[Batch, int, dict[str, int]]) -> tuple[Batch, dict[str, Any]]:
        batch, stream, position = item
        streams = list(self._position["streams"])
        streams[stream] = position
        number = self._position["num_batches"] + self._world_size
        return batch, {"num_batches": number, "streams": streams}

    def _convert(self, position: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """Keeps the positions; for another number of streams, all begin behind the furthest."""
        if len(position["streams"]) == self._num_streams:
            return position
        unit = max(stream["unit"] for stream in position["streams"]) + 1
        return {**position, "streams": _first_positions(self._num_streams, unit=unit)}


class ShardEvalLoader(FixedLoader):
    """Yields every sample once, in the order of the shards, and as many batches on every rank.

    Each rank reads a run of neighbouring samples. How many there are is counted first: by the
    headers of tar shards, which for remote ones takes a while. Pass a `TarSource`, and use it for
    further loaders, to count once.

    Where a sample is missing, because it is damaged or to make the ranks even, `filler` takes its
    place; `is_sample` of a batch, (batch,) bool, says which are samples.

    Args:
        urls: Tar shards, as `find_shards` takes them, or a source of another kind.
        decode: As for `ShardLoader`.
        filler: What `decode` might have returned, for missing samples.
        batch_size: Samples in a batch, for each rank; the last batch may hold fewer.
        collate: Makes a batch, a dict, of a list of what `decode` returns.
        max_samples: Takes so many at most; None takes all.
        on_error: "skip" leaves a sample that cannot be used out of account; "raise" stops at it.
        rank: Number of this process.
        world_size: Number of processes that share the samples.
        num_workers: Worker processes; 0 reads in this one.
        pin_memory: Whether batches go to page-locked memory.

    Raises:
        ValueError: An option is out of range, there are no shards, or no shard can be read.
    """

    def __init__(
        self,
        urls: str | Sequence[str] | RowSource,
        decode: Decode,
        *,
        filler: Mapping[str, Any],
        batch_size: int,
        collate: Collate = default_collate,
        max_samples: int | None = None,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_least(batch_size=(batch_size, 1), num_workers=(num_workers, 0))
        check_least(max_samples=(max_samples, 1))
        check_on_error(on_error)
        source = _source(urls)
        decoder = SampleDecoder(decode, on_error=on_error, seed=0)
        ends = _ends(source, max_samples)
        super().__init__(
            _EvalRows(source, ends, decoder=decoder, filler=filler, collate=collate),
            _in_runs(min(ends[-1], max_samples or ends[-1]), world_size),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class _EvalRows(Dataset[Batch]):
    """Makes the batch of a request, a list of places among the rows of all shards."""

    def __init__(
        self,
        source: RowSource,
        ends: Sequence[int],
        *,
        decoder: SampleDecoder,
        filler: Mapping[str, Any],
        collate: Collate,
    ) -> None:
        self._source, self._ends, self._decoder = source, ends, decoder
        self._filler, self._collate = filler, collate
        # The shard that is open, the row that comes next, and the items from there on.
        self._reader: tuple[int, int, Iterator[Item]] | None = None

    def __getitem__(self, request: list[int]) -> Batch:
        places = [place for place in request if place != FILLER]
        decoded: list[Any] = []
        for shard, own in itertools.groupby(places, key=self._shard):
            first = self._ends[shard - 1] if shard else 0
            decoded += self._read(shard, [place - first for place in own])
        num_skipped = decoded.count(None)
        decoded += [None] * (len(request) - len(places))
        batch = self._collate([dict(self._filler) if x is None else x for x in decoded])
        return {
            **batch,
            "is_sample": torch.tensor([sample is not None for sample in decoded]),
            "num_skipped": torch.tensor(num_skipped),
        }

    def _shard(self, place: int) -> int:
        return bisect.bisect_right(self._ends, place)

    def _read(self, shard: int, rows: list[int]) -> list[dict[str, Any] | None]:
        """Reads neighbouring rows of a shard; None for those that cannot be used."""
        items = self._items(shard, rows[0])
        decoded: list[dict[str, Any] | None] = []
        is_readable = True
        for row in rows:
            item = next(items, None)
            if item is None:
                # Otherwise the last item has said why.
                if is_readable:
                    name = self._source.shards[shard]
                    self._decoder.report(f"{name}: it held more samples when they were counted")
                break
            is_readable = item.sample is not None
            self._reader = (shard, row + 1, items) if is_readable else None
            decoded.append(self._decoder.decode(item))
        return decoded + [None] * (len(rows) - len(decoded))

    def _items(self, shard: int, row: int) -> Iterator[Item]:
        """Returns the rows from one on, of the reader that is open if it has come to there."""
        if self._reader is not None and self._reader[:2] == (shard, row):
            return self._reader[2]
        return read_items(self._source, shard, start=row)


def _ends(source: RowSource, max_samples: int | None) -> list[int]:
    """Returns the number of samples up to the end of each shard, as far as they are needed."""
    if not any(_is_readable(source, shard) for shard in range(len(source.shards))):
        raise ValueError(
            f"none of the {len(source.shards)} shards holds a sample that can be read, the first "
            f"is {source.shards[0]}. Check the paths, and read one with `tar -t`."
        )
    ends: list[int] = []
    for shard in range(len(source.shards)):
        ends.append(source.num_rows(shard) + (ends[-1] if ends else 0))
        if max_samples is not None and ends[-1] >= max_samples:
            break
    return ends


def _is_readable(source: RowSource, shard: int) -> bool:
    first = next(read_items(source, shard), None)
    return first is not None and first.sample is not None


def _in_runs(num_samples: int, world_size: int) -> list[int]:
    """Orders samples so that rank r, which gets every `world_size`-th, gets neighbouring ones."""
    per_rank = -(-num_samples // world_size)
    places = [rank * per_rank + i for i in range(per_rank) for rank in range(world_size)]
    return [place if place < num_samples else FILLER for place in places]


def _first_positions(num_streams: int, *, unit: int) -> list[dict[str, int]]:
    """Returns where the streams begin in the endless sequence of shards, behind some of it."""
    places = sorted(range(unit, unit + num_streams), key=lambda place: place % num_streams)
    return [dataclasses.asdict(StreamPosition(unit=place)) for place in places]


def _source(urls: str | Sequence[str] | RowSource) -> RowSource:
    return TarSource(urls) if isinstance(urls, str | Sequence) else urls


def _fingerprint(shards: Sequence[str]) -> str:
    # Without the folder, so that a copy is the same data.
    names = "\n".join(name.rsplit("/", 1)[-1] for name in shards)
    return f"{len(shards)} with names {hashlib.sha256(names.encode()).hexdigest()[:8]}"
