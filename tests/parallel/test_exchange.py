"""Which rows travel, in integers: nothing is missing, and nothing comes that no query sees."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.schedule import blocks_of, view_rows
from longnet_zoo.parallel.exchange import (
    exchanged_rows,
    plan_exchange,
    region_views,
)
from longnet_zoo.parallel.sequences import SplitSequences
from tests.ops.draws import patterns


@st.composite
def splits(draw):
    """A pattern, heads, and a sequence over some processes."""
    num_kv_heads = draw(st.integers(1, 3))
    return {
        "pattern": DilatedPattern(
            **draw(patterns(max_length=24)),
            head_offset=draw(st.sampled_from(["modulo", "block"])),
        ),
        "num_heads": num_kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": num_kv_heads,
        "is_causal": draw(st.booleans()),
        "seq_len": draw(st.integers(1, 40)),
        "num_parts": draw(st.integers(1, 5)),
    }


def plans_of(split, sequences):
    options = {key: split[key] for key in ("num_heads", "num_kv_heads", "is_causal")}
    device = torch.device("cpu")
    return [
        plan_exchange(sequences, part, split["pattern"], **options, device=device)
        for part in range(sequences.num_parts)
    ]


def sequences_of(split, batch=1):
    length = -(-split["seq_len"] // split["num_parts"])
    return SplitSequences(
        part_length=length, num_parts=split["num_parts"], lengths=(split["seq_len"],) * batch
    )


def received(sequences, plans, batch, num_kv_heads):
    """What each process has in its buffer if every row holds its row, position and head."""
    length, num_parts = sequences.part_length, sequences.num_parts
    whole = torch.cartesian_prod(
        torch.arange(batch), torch.arange(length * num_parts), torch.arange(num_kv_heads)
    ).view(batch, length * num_parts, num_kv_heads, 3)
    sent = [
        list(part.flatten(0, 2)[plan.sent].split(plan.sent_counts))
        for part, plan in zip(whole.split(length, dim=1), plans, strict=True)
    ]
    for part, plan in enumerate(plans):
        arrived = torch.cat([rows[part] for rows in sent])
        assert [len(rows[part]) for rows in sent] == plan.received_counts
        yield torch.empty_like(arrived).index_copy_(0, plan.places, arrived)


@given(splits())
def test_own_rows_and_those_that_arrive_are_all_that_a_query_sees(split):
    pattern, seq_len = split["pattern"], split["seq_len"]
    sequences, batch = sequences_of(split, batch=2), 2
    plans = plans_of(split, sequences)
    counts = torch.zeros(split["num_heads"], seq_len, seq_len, dtype=torch.int64)
    group_size = split["num_heads"] // split["num_kv_heads"]
    buffers = received(sequences, plans, batch, split["num_kv_heads"])
    for part, (plan, buffer) in enumerate(zip(plans, buffers, strict=True)):
        for group in sequences.groups(part):
            assert (group.first, group.count, group.seq_len) == (0, batch, seq_len)
            local = torch.arange(group.start, group.start + group.length)
            # (b, c, h) positions and heads, viewed as a block views tensors.
            rows = local[None, :, None].expand(batch, -1, split["num_heads"]).contiguous()
            for block in blocks_of(
                pattern,
                seq_len,
                split["num_heads"],
                split["num_kv_heads"],
                split["is_causal"],
                start=group.start,
                length=group.length,
            ):
                places = view_rows(rows, block)[0]
                for segment in places:
                    add_pairs(counts, segment, segment, block, is_causal=split["is_causal"])
            for region, keys in zip(plan.regions, region_views(buffer, plan.regions), strict=True):
                queries = view_rows(rows, region.block)[0, 0]
                add_pairs(counts, queries, keys[0, 0, ..., 1], region.block, is_causal=False)
                heads = range(split["num_heads"])[region.block.heads]
                expected = torch.tensor([head // group_size for head in heads])
                assert torch.equal(keys[0, 0, ..., 2], expected.expand_as(keys[0, 0, ..., 2]))
                assert (keys[1, 0, ..., 0] == 1).all()
    expected = pattern.mask_counts(seq_len, split["num_heads"], is_causal=split["is_causal"])
    assert torch.equal(counts, expected)


def add_pairs(counts, queries, keys, block, *, is_causal):
    for number, head in enumerate(range(len(counts))[block.heads]):
        pairs = torch.ones(len(queries), len(keys), dtype=torch.int64)
        counts[head].index_put_(
            (queries[:, number, None], keys[None, :, number]),
            pairs.tril() if is_causal else pairs,
            accumulate=True,
        )


@given(splits())
def test_counted_rows_are_those_of_the_plans(split):
    plans = plans_of(split, sequences_of(split))
    counts = exchanged_rows(
        split["pattern"],
        seq_len=split["seq_len"],
        num_parts=split["num_parts"],
        num_heads=split["num_heads"],
        num_kv_heads=split["num_kv_heads"],
        is_causal=split["is_causal"],
    )
    assert np.array_equal(counts, [plan.sent_counts for plan in plans])
    assert np.array_equal(counts.T, [plan.received_counts for plan in plans])
    assert not counts.diagonal().any()
    if split["is_causal"]:
        assert not np.tril(counts).any()  # no process sends keys to an earlier one
    assert all(plan.is_idle for plan in plans) or counts.any() or split["is_causal"]


@given(splits(), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_packed_sequences_travel_each_by_itself(split, documents):
    bounds = tuple(np.cumsum([0, *documents]).tolist())
    length = -(-bounds[-1] // split["num_parts"])
    sequences = SplitSequences(part_length=length, num_parts=split["num_parts"], bounds=bounds)
    plans = plans_of(split, sequences)
    document_of = np.searchsorted(bounds, np.arange(length * split["num_parts"]), side="right")
    for part, (plan, buffer) in enumerate(
        zip(plans, received(sequences, plans, 1, split["num_kv_heads"]), strict=True)
    ):
        groups = sequences.groups(part)
        assert sum(group.count * group.length for group in groups) == min(
            max(bounds[-1] - part * length, 0), length
        )
        for region, keys in zip(plan.regions, region_views(buffer, plan.regions), strict=True):
            own = document_of[part * length + region.group.first]
            assert (document_of[keys[..., 1]] == own).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_traffic_of_a_process_does_not_grow_with_the_length(is_causal):
    received_rows = []
    for scale in (1, 4, 16, 64):
        pattern = DilatedPattern(segment_lengths=(256, 1024 * scale), dilation_rates=(1, 4 * scale))
        counts = exchanged_rows(
            pattern,
            seq_len=2048 * scale,
            num_parts=8,
            num_heads=8,
            num_kv_heads=8,
            is_causal=is_causal,
        )
        received_rows.append(counts.sum(axis=0).max())
    assert len(set(received_rows)) == 1
    assert received_rows[0] == 8 * 256 * 3 // 4  # of 4 processes in a segment, 3 are others


def test_a_longer_sequence_over_more_processes_sends_no_more():
    pattern = DilatedPattern.geometric(64, 512)
    most = {
        num_parts: exchanged_rows(
            pattern,
            seq_len=128 * num_parts,
            num_parts=num_parts,
            num_heads=4,
            num_kv_heads=4,
            is_causal=True,
        )
        .sum(axis=0)
        .max()
        for num_parts in (4, 8, 64, 256)
    }
    assert len(set(most.values())) == 1, most
