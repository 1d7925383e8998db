import pytest
import torch

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.planner.work import pairs_of_heads, pairs_of_parts

PATTERNS = [
    DilatedPattern(segment_lengths=(4, 7, 23), dilation_rates=(1, 3, 5)),
    DilatedPattern(segment_lengths=(5, 100), dilation_rates=(2, 4), head_offset="block"),
    DilatedPattern(segment_lengths=(100,), dilation_rates=(1,)),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_of_parts_are_those_of_the_mask(pattern, num_parts, is_causal):
    seq_len, num_heads = 41, 6
    options = {"seq_len": seq_len, "num_parts": num_parts, "num_heads": num_heads}
    pairs, own_pairs = pairs_of_parts(pattern, **options, is_causal=is_causal)
    counts = pattern.mask_counts(seq_len, num_heads, is_causal=is_causal).sum(0)
    parts = torch.arange(seq_len) // -(-seq_len // num_parts)
    for part in range(num_parts):
        rows = counts[parts == part]
        assert pairs[part] == rows.sum()
        assert own_pairs[part] == rows[:, parts == part].sum()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_of_heads_are_those_of_the_mask(pattern, is_causal):
    pairs = pairs_of_heads(pattern, seq_len=41, num_parts=3, num_heads=6, is_causal=is_causal)
    counts = pattern.mask_counts(41, 6, is_causal=is_causal).sum((1, 2)).view(3, 2).sum(1)
    assert pairs.tolist() == counts.tolist()


def test_a_billion_tokens_are_counted_at_once():
    pattern = DilatedPattern.geometric(2048, 2**30)
    options = {"seq_len": 10**9, "num_heads": 12, "is_causal": True}
    pairs, _ = pairs_of_parts(pattern, num_parts=256, **options)
    assert pairs.sum() == pytest.approx(pattern.attended_pairs(10**9, 12, is_causal=True))
