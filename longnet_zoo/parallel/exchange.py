"""Which keys and values processes send each other, so that segments may cross their borders.

Every process holds `part_length` tokens of each row of the batch. Where a segment of a branch lies
on several processes, each gets the *sparsified* keys and values of that segment that the others
have: those of the rate and the offsets of its heads, and for causal attention only the earlier
ones. All branches travel in one call. Everything here but `Exchange` is integers.

Shape legend: b batch, c part_length, h key heads, d head_dim, m rows that travel, each of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.schedule import Block, blocks_of
from longnet_zoo.ops.sequences import SequenceGroup

from .sequences import SplitSequences

__all__ = [
    "Exchange",
    "ExchangePlan",
    "Region",
    "exchanged_rows",
    "plan_exchange",
]


@dataclass(frozen=True, kw_only=True)
class Region:
    """Rows of one segment that come from other processes, for the heads of one block.

    Attributes:
        group: Sequences that the block belongs to, of the process that asks.
        block: The block, whose queries see all rows of the region.
        first_key: The row of the segment that comes first.
        num_rows: Rows in each head.
        num_heads: Heads that are sent: 1 where all heads of the block read the same rows.
        offset: Where the region begins in the buffer of all regions; it is laid out as
            (sequences of the group, num_rows, num_heads).
    """

    group: SequenceGroup
    block: Block
    first_key: int
    num_rows: int
    num_heads: int
    offset: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, rows and heads in the buffer."""
        return self.group.count, self.num_rows, self.num_heads

    @property
    def stop(self) -> int:
        """Where the next region begins in the buffer."""
        sequences, rows, heads = self.shape
        return self.offset + sequences * rows * heads

    def first_positions(self) -> np.ndarray:
        """Place in the sequence of the first row of each head, (num_heads,)."""
        block = self.block
        own = self.group.start + block.row_start + block.head_skew * np.arange(self.num_heads)
        return own + (self.first_key - block.num_before) * block.row_step

    def kv_heads(self) -> np.ndarray:
        """The key heads that are sent, (num_heads,)."""
        return self.block.kv_head_start + self.block.kv_head_step * np.arange(self.num_heads)


def regions_of(
    groups: list[SequenceGroup],
    pattern: DilatedPattern,
    *,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
) -> tuple[Region, ...]:
    """Lists what a process needs of the others, in the order of its buffer."""
    regions, offset = [], 0
    for group in groups:
        for block in blocks_of(
            pattern,
            group.seq_len,
            num_heads,
            num_kv_heads,
            is_causal,
            start=group.start,
            length=group.length,
        ):
            first_after = block.num_before + block.num_rows
            for first, rows in ((0, block.num_before), (first_after, block.num_after)):
                if rows:
                    region = Region(
                        group=group,
                        block=block,
                        first_key=first,
                        num_rows=rows,
                        num_heads=1 if block.is_kv_shared else block.num_heads,
                        offset=offset,
                    )
                    regions.append(region)
                    offset = region.stop
    return tuple(regions)


@lru_cache
def is_as_whole(
    pattern: DilatedPattern,
    group: SequenceGroup,
    *,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
) -> bool:
    """Whether parts of sequences have the rows that whole sequences of their length would have."""
    blocks_of_length = partial(
        blocks_of,
        pattern,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        is_causal=is_causal,
    )
    part = blocks_of_length(group.seq_len, start=group.start, length=group.length)
    whole = blocks_of_length(group.length)
    return frozenset().union(*map(_rows_of, part)) == frozenset().union(*map(_rows_of, whole))


def _rows_of(block: Block) -> frozenset[tuple[int, ...]]:
    step = block.segment_stride if block.num_segments > 1 else 0
    return frozenset(
        (
            block.branch,
            head,
            block.row_start + number * block.head_skew,
            block.num_rows,
            block.num_segments,
            step,
            block.num_zero_keys,
        )
        for number, head in enumerate(range(block.heads.stop)[block.heads])
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ExchangePlan:
    """What one process sends and receives.

    Attributes:
        regions: What it needs, in the order of its buffer.
        sent: Rows to send, in the order of the receivers: indices into keys (b * c * h), int64.
        sent_counts: How many go to each process.
        places: Place in the buffer of each row that arrives, in the order of the senders, int64.
        received_counts: How many come from each process.
        is_idle: Whether no process sends anything.
    """

    regions: tuple[Region, ...]
    sent: Tensor
    sent_counts: list[int]
    places: Tensor
    received_counts: list[int]
    is_idle: bool


@lru_cache(maxsize=32)
def plan_exchange(
    sequences: SplitSequences,
    part: int,
    pattern: DilatedPattern,
    *,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
    device: torch.device,
) -> ExchangePlan:
    """Plans the exchange of one process; kept, since every layer and step asks for the same one.

    Args:
        sequences: The sequences.
        part: Number of the process.
        pattern: The schedule.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        is_causal: Whether a query sees no later key.
        device: Where the indices are used.
    """
    parts = range(sequences.num_parts)
    wanted = [
        regions_of(
            sequences.groups(other),
            pattern,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            is_causal=is_causal,
        )
        for other in parts
    ]
    sent = [np.zeros(0, np.int64)]
    for other in parts:
        senders, rows, _ = _travelling(wanted[other], sequences, other, num_kv_heads)
        sent.append(rows[senders == part])
    senders, _, places = _travelling(wanted[part], sequences, part, num_kv_heads)
    order = np.argsort(senders, kind="stable")
    return ExchangePlan(
        regions=wanted[part],
        sent=torch.from_numpy(np.concatenate(sent)).to(device),
        sent_counts=[len(rows) for rows in sent[1:]],
        places=torch.from_numpy(places[order]).to(device),
        received_counts=np.bincount(senders, minlength=sequences.num_parts).tolist(),
        is_idle=not any(wanted),
    )


def _travelling(
    regions: tuple[Region, ...], sequences: SplitSequences, part: int, num_kv_heads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sender, index in the sender's keys (b * c * h) and place in the buffer of each row."""
    length = sequences.part_length
    senders, rows, places = ([np.zeros(0, np.int64)] for _ in range(3))
    for region in regions:
        group, (count, num_rows, _) = region.group, region.shape
        steps = region.block.row_step * np.arange(num_rows)
        positions = steps[:, None] + region.first_positions()  # (rows, heads), in the sequence
        if group.is_packed:
            positions = positions + (part * length + group.first - group.start)
        sender, place = np.divmod(positions, length)
        batch_rows = np.zeros(1, np.int64) if group.is_packed else group.first + np.arange(count)
        flat = (batch_rows[:, None, None] * length + place) * num_kv_heads + region.kv_heads()
        senders.append(np.broadcast_to(sender, flat.shape).ravel())
        rows.append(flat.ravel())
        places.append(np.arange(region.offset, region.stop))
    return np.concatenate(senders), np.concatenate(rows), np.concatenate(places)


def exchanged_rows(
    pattern: DilatedPattern,
    *,
    seq_len: int,
    num_parts: int,
    num_heads: int,
    num_kv_heads: int,
    is_causal: bool,
    batch: int = 1,
) -> np.ndarray:
    """Counts the rows of a head that each process sends each other one in a layer.

    The work grows with the number of processes, not with the length.

    Args:
        pattern: The schedule.
        seq_len: Tokens of a sequence; parts are equal, and the last ones may end in padding.
        num_parts: Number of processes.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        is_causal: Whether a query sees no later key.
        batch: Sequences.

    Returns:
        int64 (senders, receivers). Each row travels as a key and a value of `head_dim` channels,
        and its gradients travel back.
    """
    sequences = SplitSequences(
        part_length=-(-seq_len // num_parts), num_parts=num_parts, lengths=(seq_len,) * batch
    )
    borders = sequences.part_length * np.arange(num_parts + 1)
    counts = np.zeros((num_parts, num_parts), np.int64)
    for part in range(num_parts):
        for region in regions_of(
            sequences.groups(part),
            pattern,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            is_causal=is_causal,
        ):
            # Rows of each head before each border.
            reached = -(-(borders[:, None] - region.first_positions()) // region.block.row_step)
            reached = reached.clip(0, region.num_rows).sum(axis=1)
            counts[:, part] += region.group.count * np.diff(reached)
    return counts


class Exchange:
    """Sends keys, values and their gradients as a plan says.

    Args:
        plan: The plan of this process.
        group: The processes that share the sequences.
    """

    def __init__(self, plan: ExchangePlan, group: dist.ProcessGroup) -> None:
        self.plan, self._group = plan, group

    def start(self, *tensors: Tensor) -> _Arriving:
        """Starts to send rows of tensors (b, c, h, ...), all of one dtype.

        Returns:
            What waits for the rows of the other processes, (m, sum of the channels).
        """
        flat = [x.flatten(0, 2).flatten(1) if x.ndim > 3 else x.flatten()[:, None] for x in tensors]
        rows = [x.index_select(0, self.plan.sent) for x in flat]
        return self._send(torch.cat(rows, dim=1), self.plan.sent_counts, self.plan.received_counts)

    def start_back(self, grads: Tensor) -> _Arriving:
        """Starts to send back the gradients (m, ...) of the rows that arrived."""
        rows = grads.index_select(0, self.plan.places)
        return self._send(rows, self.plan.received_counts, self.plan.sent_counts)

    def sorted(self, rows: Tensor) -> Tensor:
        """Puts rows that arrived in the order of the regions."""
        return torch.empty_like(rows).index_copy_(0, self.plan.places, rows)

    def add_(self, total: Tensor, rows: Tensor) -> None:
        """Adds gradients that came back to those of keys or values, (b, c, h, d), contiguous."""
        # A row may have gone to several processes. The order of the sum does not depend on chance.
        total.flatten(0, 2).index_put_((self.plan.sent,), rows.to(total.dtype), accumulate=True)

    def _send(self, rows: Tensor, counts: list[int], received_counts: list[int]) -> _Arriving:
        received = rows.new_empty(sum(received_counts), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows, received_counts, counts, group=self._group, async_op=True
        )
        assert work is not None
        return _Arriving(received, rows, work)


@dataclass(frozen=True)
class _Arriving:
    received: Tensor
    sent: Tensor  # kept until it has been sent
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received


def region_views(buffer: Tensor, regions: tuple[Region, ...]) -> Iterator[Tensor]:
    """Views a buffer (m, d) as keys (sequences, 1 segment, rows, heads, d), region by region."""
    for region in regions:
        rows = buffer[region.offset : region.stop].view(*region.shape, *buffer.shape[1:])
        yield rows.unsqueeze(1).expand(-1, -1, -1, region.block.num_heads, *(-1,) * (rows.ndim - 3))
