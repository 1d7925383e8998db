"""Tiles of rows: every pair that may be attended is in one pair of tiles, and no other is."""

import pytest
import torch

from longnet_zoo.ops.masked_tiles import (
    TiledRows,
    _attend_in_products,
    attend_masked,
    differentiate_masked,
)
from longnet_zoo.ops.sequences import split_sequences
from longnet_zoo.ops.tiles import TilePlan, plan_blocks, plan_labels

BATCH, SEQ_LEN, NUM_HEADS, NUM_KV_HEADS = 2, 150, 4, 2


def counts_of(plan: TilePlan) -> torch.Tensor:
    """How often the plan shows key j to query i, (b, h, i, j)."""
    counts = torch.zeros(BATCH, NUM_HEADS, SEQ_LEN, SEQ_LEN, dtype=torch.int64)
    for pairs, is_full in ((plan.full, True), (plan.partial, False)):
        for queries, keys in pairs.by_rank():
            for query, key in zip(queries.tolist(), keys.flatten().tolist(), strict=True):
                add_pairs(counts, plan, query, key, is_full=is_full)
    return counts


def add_pairs(counts, plan, query, key, *, is_full):
    for row, limit in zip(plan.query_rows[query], plan.query_limits[query], strict=True):
        is_seen = plan.key_places[key] <= limit
        if limit < 0:
            assert not is_full or row == BATCH * SEQ_LEN * NUM_HEADS
            continue
        assert is_seen.all() or not is_full
        token, head = row // NUM_HEADS, row % NUM_HEADS
        key_tokens = plan.key_rows[key][is_seen] // NUM_KV_HEADS
        key_heads = plan.key_rows[key][is_seen] % NUM_KV_HEADS
        assert (key_heads == head // 2).all()
        assert (key_tokens // SEQ_LEN == token // SEQ_LEN).all()
        counts[token // SEQ_LEN, head, token % SEQ_LEN, key_tokens % SEQ_LEN] += 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_labels_pair_each_query_with_each_key_of_its_label_once(is_causal):
    query_labels, key_labels = torch.randint(-1, 3, (2, BATCH, SEQ_LEN, NUM_HEADS))
    plan = plan_labels(
        query_labels, key_labels, num_labels=3, num_kv_heads=NUM_KV_HEADS, is_causal=is_causal
    )
    queries, keys = query_labels.permute(0, 2, 1), key_labels.permute(0, 2, 1)
    expected = (queries[..., :, None] == keys[..., None, :]) & (queries[..., None] >= 0)
    expected = expected.tril() if is_causal else expected
    assert torch.equal(counts_of(plan), expected.long())
    assert len(plan.full.keys) > 0


@pytest.mark.parametrize("rows_per_label", [4, 20, 200])
def test_labels_of_few_rows_take_few_empty_slots(rows_per_label):
    seq_len, num_labels = 6000, 6000 // rows_per_label
    labels = torch.randint(num_labels, (1, seq_len, 1))
    plan = plan_labels(labels, labels, num_labels=num_labels, num_kv_heads=1, is_causal=True)
    assert plan.query_rows.numel() < 2.5 * seq_len


@pytest.mark.parametrize("block_size", [16, 31, 300])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_by_head", [False, True])
def test_blocks_pair_each_query_with_each_key_of_its_blocks_once(is_by_head, is_causal, block_size):
    num_blocks = -(-SEQ_LEN // block_size)
    mask = torch.rand(*(NUM_HEADS,) * is_by_head, num_blocks, num_blocks) < 0.6
    is_padding = torch.rand(BATCH, SEQ_LEN) < 0.1
    x = torch.randn(BATCH, SEQ_LEN)
    (group,), is_hidden = split_sequences(x, is_padding, None, is_single=False)
    plan = plan_blocks(
        mask.nonzero().T,
        block_size,
        group,
        shape=(BATCH, SEQ_LEN, NUM_HEADS, NUM_KV_HEADS),
        is_causal=is_causal,
        is_hidden=is_hidden,
    )
    blocks = torch.arange(SEQ_LEN) // block_size
    expected = mask.expand(1, NUM_HEADS, -1, -1)[:, :, blocks[:, None], blocks]
    expected = expected & ~is_padding[:, None, None] & ~is_padding[:, None, :, None]
    expected = expected.tril() if is_causal else expected
    assert torch.equal(counts_of(plan), expected.long())


def test_large_blocks_are_several_tiles():
    (group,), _ = split_sequences(torch.empty(1, 3000), None, None, is_single=False)
    mask = torch.eye(3, dtype=torch.bool)
    options = {"shape": (1, 3000, 1, 1), "is_causal": False, "is_hidden": None}
    plan = plan_blocks(mask.nonzero().T, 1000, group, **options)
    assert plan.query_rows.shape == plan.key_places.shape == (12, 250)
    ((queries, keys),) = plan.full.by_count()
    assert queries.tolist() == list(range(12))
    # Each of a block's four tiles sees all four, in their order.
    assert keys.tolist() == [[4 * (tile // 4) + part for part in range(4)] for tile in range(12)]


def test_work_is_that_of_the_tiles_that_are_seen():
    seq_len, size = 8192, 128
    mask = torch.eye(seq_len // size, dtype=torch.bool)
    (group,), _ = split_sequences(torch.empty(1, seq_len), None, None, is_single=False)
    shape = (1, seq_len, 1, 1)
    options = {"shape": shape, "is_causal": True, "is_hidden": None}
    plan = plan_blocks(mask.nonzero().T, size, group, **options)
    assert len(plan.full.keys) == 0
    assert len(plan.partial.keys) == seq_len // size
    mask[:, 0] = True
    plan = plan_blocks(mask.nonzero().T, size, group, **options)
    assert len(plan.full.keys) == seq_len // size - 1


def test_both_ways_to_attend_masked_tiles_agree_with_a_dense_softmax():
    rows = [torch.randn(3, size, 8) for size in (16, 16, 24, 24, 16)]
    out_grad, q, k, v, _ = rows
    limits, places = torch.randint(-1, 20, (3, 16)), torch.randint(0, 30, (3, 24))
    bounds = {"limits": limits, "places": places, "scale": 0.3}
    out, lse = attend_masked(q, k, v, **bounds)
    is_hidden = places[:, None] > limits[:, :, None]
    logits = (0.3 * q @ k.mT).masked_fill(is_hidden, float("-inf"))
    expected_lse = logits.logsumexp(-1)
    expected = logits.softmax(-1).nan_to_num() @ v
    in_products = _attend_in_products(q, k, v, *bounds.values())
    for found in ((out, lse), in_products):
        torch.testing.assert_close(found, (expected, expected_lse))
    full_lse = lse.masked_fill(lse.isneginf(), float("inf"))
    found = [
        differentiate_masked(
            TiledRows(out_grad=out_grad, q=q, k=k, v=v, out=out, lse=full_lse, lse_grad=lse_grad),
            **bounds,
        )
        for lse_grad in (None, torch.zeros(3, 16))
    ]
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)
