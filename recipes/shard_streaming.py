"""Training batches from shards: which stream reads what, in which order, and from where on.

The shards, mixed anew for each epoch, make one sequence without end. It is dealt out to a number of
streams, which thus read no sample twice in an epoch; where there are fewer shards than streams,
some streams share a shard and take every second, every third sample of it. A stream holds a block
of samples and hands them out in a mixed order, while the next block fills up behind it.

The batches of all ranks are numbered, and batch i is the next one of stream i mod `num_streams`.
So neither the number of ranks nor that of worker processes decides what is in it. The position of
a stream is where its block starts and how many samples of that it has handed out: enough to read
the block again, so that a run resumes exactly.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .loader import Batch, OnError
from .seeding import seeded
from .shard_files import Problem, RowSource, Sample

__all__ = [
    "Collate",
    "Decode",
    "Item",
    "SampleDecoder",
    "ShardStreams",
    "StreamPosition",
    "read_items",
]

Decode = Callable[[Sample], dict[str, Any]]
Collate = Callable[[list[dict[str, Any]]], Batch]

# So many shards in a row without a sample that can be used are no accident.
_PATIENCE = 32

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A sample, or what is wrong in its place.

    Attributes:
        row: Its number in the shard.
        sample: The sample; None where there is none.
        problem: What is wrong there, by shard and sample.
        unit: Which of the endless sequence of shards it was read in.
    """

    row: int
    sample: Sample | None = None
    problem: str = ""
    unit: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream goes on.

    Attributes:
        unit: Which of the endless sequence of shards its block starts in.
        row: Sample of that shard that the block starts with.
        block: Number of the block, counted from 0.
        taken: Samples of the block that were handed out.
    """

    unit: int
    row: int = 0
    block: int = 0
    taken: int = 0


def read_items(source: RowSource, shard: int, *, start: int = 0) -> Iterator[Item]:
    """Reads a shard from a row on; where it cannot be read any further, the last item says why.

    Args:
        source: The shards.
        shard: Which one.
        start: The first row.
    """
    name, row = source.shards[shard], start
    try:
        for sample in source.rows(shard, start=start):
            if isinstance(sample, Problem):
                yield Item(row=row, problem=f"{name}, sample {sample.key}: {sample.reason}")
            else:
                yield Item(row=row, sample=sample)
            row += 1
    except OSError as error:
        reason = error.strerror or error
        yield Item(row=row, problem=f"{name}, from its sample number {row} on: {reason}")
    else:
        if row == 0:
            yield Item(row=0, problem=f"{name}: it holds no samples")


class SampleDecoder:
    """Decodes samples, and logs those that cannot be used or stops at them.

    Args:
        decode: Makes of a sample what a batch is made of; OSError and ValueError say that it is
            damaged.
        on_error: "skip" or "raise".
        seed: Seed of what `decode` draws.
    """

    def __init__(self, decode: Decode, *, on_error: OnError, seed: int) -> None:
        self._decode, self._on_error, self._seed = decode, on_error, seed

    def decode(self, item: Item) -> dict[str, Any] | None:
        """Returns a decoded sample, or None if it is to be skipped.

        Raises:
            ValueError: It cannot be used, and `on_error` is "raise".
        """
        if item.sample is None:
            self.report(item.problem)
            return None
        try:
            with seeded((self._seed, item.unit, item.row)):
                return self._decode(item.sample)
        except (OSError, ValueError) as error:
            where = f"{item.sample['__url__']}, sample {item.sample['__key__']}"
            self.report(f"{where}: {error}", cause=error)
            return None

    def report(self, problem: str, *, cause: Exception | None = None) -> None:
        """Logs a problem, or raises it."""
        self.stop_at(problem, cause=cause)
        _log.warning("skipped: %s", problem)

    def stop_at(self, problem: str, *, cause: Exception | None = None) -> None:
        """Raises a problem if `on_error` is "raise"."""
        if self._on_error == "raise":
            raise ValueError(
                f"{problem}. (Or pass --data.on_error skip, which goes on without such samples.)"
            ) from cause


class ShardStreams(IterableDataset[tuple[Batch, int, dict[str, int]]]):
    """Yields the batches of a rank without end, each with its stream and the position behind it.

    Args:
        source: The shards.
        decoder: Decodes the samples.
        collate: Makes a batch of decoded samples.
        batch_size: Samples in a batch.
        seed: Seed of the order.
        shuffle: Samples that each stream holds and mixes; 0 keeps shards and samples in order.
        num_streams: Number of streams, a multiple of the number of ranks times workers.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        decoder: SampleDecoder,
        collate: Collate,
        batch_size: int,
        seed: int,
        shuffle: int,
        num_streams: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._source, self._decoder, self._collate = source, decoder, collate
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._num_streams, self._rank, self._world_size = num_streams, rank, world_size
        # Parts of a shard, so that there is one for each stream.
        self._num_parts = -(-num_streams // len(source.shards))
        self._num_batches = 0
        self._positions: Sequence[StreamPosition] = ()

    def start_at(self, num_batches: int, positions: Sequence[StreamPosition]) -> None:
        """Sets where to go on.

        Args:
            num_batches: Batches that this rank has handed out.
            positions: Position of each stream.
        """
        self._num_batches, self._positions = num_batches, positions

    def __iter__(self) -> Iterator[tuple[Batch, int, dict[str, int]]]:
        """Goes on from where `start_at` says; a worker makes every so many batches."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        streams: dict[int, Iterator[tuple[Batch, StreamPosition]]] = {}
        for number in itertools.count(self._num_batches + first, step):
            stream = (number * self._world_size + self._rank) % self._num_streams
            if stream not in streams:
                streams[stream] = self._batches(stream)
            batch, position = next(streams[stream])
            yield batch, stream, dataclasses.asdict(position)

    def _batches(self, stream: int) -> Iterator[tuple[Batch, StreamPosition]]:
        """Yields the batches of a stream, and the position behind each."""
        decoded: list[dict[str, Any]] = []
        num_skipped = 0
        block, since, is_barren = -1, 0, False
        for start, item, after in self._mixed(self._positions[stream], stream):
            if start.block != block:
                since = since if is_barren else start.unit
                self._check_patience((start.unit - since) // self._num_streams, item)
                block, is_barren = start.block, True
            sample = self._decoder.decode(item)
            if sample is None:
                num_skipped += 1
                continue
            is_barren = False
            decoded.append(sample)
            if len(decoded) == self._batch_size:
                batch = self._collate(decoded)
                yield {**batch, "num_skipped": torch.tensor(num_skipped)}, after
                decoded, num_skipped = [], 0

    def _mixed(
        self, start: StreamPosition, stream: int
    ) -> Iterator[tuple[StreamPosition, Item, StreamPosition]]:
        """Yields where a block starts, an item of it, and the position behind that item."""
        size = max(1, self._shuffle)
        items = self._items(start)
        held = dict(enumerate(itertools.islice(items, size)))
        while True:
            order = np.random.default_rng((self._seed, 1, stream, start.block)).permutation(size)
            following: list[Item] = []
            for taken, place in enumerate(order.tolist(), 1):
                item = held.pop(place)
                following.append(next(items))
                if taken <= start.taken:
                    continue
                if taken < size:
                    after = dataclasses.replace(start, taken=taken)
                else:
                    head = following[0]
                    after = StreamPosition(unit=head.unit, row=head.row, block=start.block + 1)
                yield start, item, after
            start, held = after, dict(enumerate(following))

    def _items(self, start: StreamPosition) -> Iterator[Item]:
        """Yields the items of a stream in the order in which they are read, without end."""
        num_barren, row = 0, start.row
        for unit in itertools.count(start.unit, self._num_streams):
            shard, part = self._unit(unit)
            has_sample, problem = False, None
            for item in read_items(self._source, shard, start=row):
                if item.sample is None:
                    self._decoder.stop_at(item.problem)
                if item.row % self._num_parts == part or item.sample is None:
                    has_sample = has_sample or item.sample is not None
                    problem = item if item.sample is None else problem
                    yield dataclasses.replace(item, unit=unit)
            if has_sample:
                num_barren = 0
            elif problem is not None:
                num_barren += 1
                self._check_patience(num_barren, problem)
            row = 0

    def _unit(self, unit: int) -> tuple[int, int]:
        """Returns shard and part at a place of the endless sequence."""
        num_shards = len(self._source.shards)
        epoch, place = divmod(unit, num_shards * self._num_parts)
        if self._shuffle:
            order = np.random.default_rng((self._seed, 0, epoch))
            place = int(order.permutation(num_shards * self._num_parts)[place])
        return place % num_shards, place // num_shards

    def _check_patience(self, num_shards: int, item: Item) -> None:
        if num_shards >= _PATIENCE:
            raise ValueError(
                f"none of the last {num_shards} shards held a sample that can be used, of "
                f"{len(self._source.shards)} in all. The last problem: "
                f"{item.problem or 'see the log'}."
            )
