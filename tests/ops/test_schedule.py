import pytest
import torch

from longnet_zoo.ops import DilatedPattern
from longnet_zoo.ops.schedule import blocks_of, view_pairs, view_rows

PATTERNS = [
    DilatedPattern(segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4)),
    DilatedPattern(segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4), head_offset="block"),
    DilatedPattern(segment_lengths=(5, 13), dilation_rates=(2, 6)),
    DilatedPattern(segment_lengths=(7,), dilation_rates=(7,), head_offset="block"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("seq_len", [1, 3, 16, 29, 32])
def test_blocks_cover_each_pair_as_often_as_the_mask_counts(
    pattern, num_heads, num_kv_heads, seq_len
):
    # Each row carries its own number, so that a view tells which rows and heads it shows.
    positions = torch.arange(seq_len).view(1, -1, 1).expand(1, -1, num_heads).contiguous()
    heads = torch.arange(num_heads).view(1, 1, -1).expand(1, seq_len, -1).contiguous()
    kv_positions = positions[:, :, :num_kv_heads].contiguous()
    kv_heads = heads[:, :, :num_kv_heads].contiguous()
    counts = torch.zeros(num_heads, seq_len, seq_len, dtype=torch.int64)
    group_size = num_heads // num_kv_heads
    for block in blocks_of(pattern, seq_len, num_heads, num_kv_heads, False):
        rows = view_rows(positions, block)[0]
        row_heads = view_rows(heads, block)[0]
        assert torch.equal(view_rows(kv_positions, block, is_kv=True)[0], rows)
        assert torch.equal(view_rows(kv_heads, block, is_kv=True)[0], row_heads // group_size)
        for segment, segment_heads in zip(rows, row_heads, strict=True):
            for head in range(block.num_heads):
                assert segment_heads[:, head].unique().numel() == 1
                index = segment[:, head]
                counts[segment_heads[0, head]][index[:, None], index] += 1
    assert torch.equal(counts, pattern.mask_counts(seq_len, num_heads))


def test_power_of_two_patterns_need_few_calls():
    pattern = DilatedPattern.geometric(1024, 8192)
    assert len(blocks_of(pattern, 32768, 8, 8, True)) == 1 + 2 + 2 + 1
    assert len(blocks_of(pattern, 32768, 8, 1, True)) == 1 + 2 + 2 + 1


def test_zero_keys_fill_the_segment():
    pattern = DilatedPattern(segment_lengths=(8,), dilation_rates=(3,), padded_keys="zero")
    # ceil(8 / 3) = 3 places per segment: offsets 0, 1 and 2 hold 3, 3 and 2 of 8 positions, and
    # 1, 1 and 0 of the 2 in the tail, where offset 2 has no row to attend.
    found = {
        (block.row_start, block.head_start + head): block.num_zero_keys
        for block in blocks_of(pattern, 10, 3, 3, False)
        for head in range(block.num_heads)
    }
    assert sorted(found.values()) == [0, 0, 1, 2, 2]
    assert all(block.num_zero_keys == 0 for block in blocks_of(pattern, 10, 3, 3, True))


def test_pairs_view_picks_rows_twice():
    pattern = DilatedPattern(segment_lengths=(6,), dilation_rates=(2,))
    bias = torch.arange(2 * 2 * 12 * 12).view(2, 2, 12, 12)
    for block in blocks_of(pattern, 12, 2, 2, False):
        rows = view_rows(torch.arange(12).view(1, -1, 1).expand(1, -1, 2).contiguous(), block)[0]
        pairs = view_pairs(bias, block)
        for segment in range(block.num_segments):
            for head in range(block.num_heads):
                index = rows[segment, :, head]
                expected = bias[:, block.head_start + head * block.head_step]
                expected = expected[:, index[:, None], index]
                assert torch.equal(pairs[:, segment, head], expected)
