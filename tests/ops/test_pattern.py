import dataclasses

import pytest
import torch

from longnet_zoo.ops import DilatedPattern
from longnet_zoo.ops.pattern import DENSE_SEGMENT


def test_geometric_is_the_papers_style():
    pattern = DilatedPattern.geometric(2048, 32768)
    assert pattern.branches == ((2048, 1), (4096, 2), (8192, 4), (16384, 8), (32768, 16))
    assert DilatedPattern.geometric(5, 45, ratio=3).branches == ((5, 1), (15, 3), (45, 9))
    assert DilatedPattern.geometric(7, 7).branches == ((7, 1),)


def test_offsets_follow_paper_or_torchscale():
    branches = {"segment_lengths": (8, 32), "dilation_rates": (1, 4)}
    assert DilatedPattern(**branches).offsets(1, 6) == (0, 1, 2, 3, 0, 1)
    assert DilatedPattern(**branches, head_offset="block").offsets(1, 6) == (0, 0, 1, 1, 2, 2)
    assert DilatedPattern(**branches).offsets(0, 3) == (0, 0, 0)


@pytest.mark.parametrize("head_offset", ["modulo", "block"])
def test_heads_of_a_layer_keep_their_offsets_where_only_some_are_there(head_offset):
    pattern = DilatedPattern(
        segment_lengths=(8, 24), dilation_rates=(1, 4), head_offset=head_offset
    )
    whole = pattern.offsets(1, 6)
    parts = [
        dataclasses.replace(pattern, first_head=first, total_heads=6).offsets(1, 2)
        for first in (0, 2, 4)
    ]
    assert sum(parts, ()) == whole


@pytest.mark.parametrize("seq_len", [0, -3])
def test_an_empty_sequence_has_no_pairs_to_count(seq_len):
    pattern = DilatedPattern(segment_lengths=(8,), dilation_rates=(1,))
    with pytest.raises(ValueError, match=f"seq_len must be at least 1, got {seq_len}"):
        pattern.flops(seq_len, 4, 16)


def test_mask_counts_by_hand():
    # One head, segments of 4 at rate 1 and 6 at rate 2: even places of segment 0..5 are added.
    pattern = DilatedPattern(segment_lengths=(4, 6), dilation_rates=(1, 2))
    counts = pattern.mask_counts(6, 1)[0]
    expected = torch.tensor(
        [
            [2, 1, 2, 1, 1, 0],
            [1, 1, 1, 1, 0, 0],
            [2, 1, 2, 1, 1, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 0, 1, 0, 2, 1],
            [0, 0, 0, 0, 1, 1],
        ]
    )
    assert torch.equal(counts, expected)
    assert torch.equal(pattern.mask_counts(6, 1, is_causal=True)[0], expected.tril())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_offset", ["modulo", "block"])
@pytest.mark.parametrize("seq_len", [1, 5, 16, 37, 64])
def test_attended_pairs_count_the_mask(seq_len, head_offset, is_causal):
    pattern = DilatedPattern(
        segment_lengths=(5, 16, 29), dilation_rates=(1, 3, 7), head_offset=head_offset
    )
    counts = pattern.mask_counts(seq_len, 6, is_causal=is_causal)
    pairs = pattern.attended_pairs(seq_len, 6, is_causal=is_causal)
    assert pairs == counts.sum()
    assert pattern.flops(seq_len, 6, 8, is_causal=is_causal) == (4 * 8 * pairs, 10 * 8 * pairs)


def test_pairs_grow_linearly_with_the_sequence():
    pattern = DilatedPattern.geometric(64, 512)
    assert pattern.attended_pairs(8192, 8) == 8 * pattern.attended_pairs(1024, 8)


def test_pattern_is_frozen_and_hashable():
    pattern = DilatedPattern(segment_lengths=[4, 8], dilation_rates=[1, 2])
    assert pattern == DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 2))
    assert len({pattern, DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 2))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.segment_lengths = (4,)


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ((), (), r"at least one branch.*segment_lengths=\(\)"),
        ((4, 8), (1,), r"same length.*\(4, 8\).*\(1,\)"),
        ((8, 4), (1, 2), r"strictly increasing, got \(8, 4\)"),
        ((4, 4), (1, 2), r"strictly increasing, got \(4, 4\)"),
        ((0, 4), (1, 2), r"strictly increasing, got \(0, 4\)"),
        ((4, 2**63), (1, 2), "segment_lengths must be 9223372036854775807 or less, got 92233720"),
        ((4, 8), (1, 0), r"got rate 0 for segment length 8"),
        ((4, 8), (5, 1), r"got rate 5 for segment length 4"),
    ],
)
def test_impossible_branches_are_refused(lengths, rates, message):
    with pytest.raises(ValueError, match=message):
        DilatedPattern(segment_lengths=lengths, dilation_rates=rates)


@pytest.mark.parametrize("lengths", [(4.0,), "16", 16, (True,)])
def test_lengths_must_be_integers(lengths):
    with pytest.raises(TypeError, match="segment_lengths must be a tuple of integers, got"):
        DilatedPattern(segment_lengths=lengths, dilation_rates=(1,))


@pytest.mark.parametrize(("name", "value"), [("head_offset", "groups"), ("padded_keys", "one")])
def test_switches_must_be_known(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be one of \(.*\), got '{value}'"):
        DilatedPattern(segment_lengths=(4,), dilation_rates=(1,), **{name: value})


def test_geometric_names_the_nearest_lengths():
    with pytest.raises(ValueError, match=r"max_segment_length=3000.*Nearest: 2048 or 4096"):
        DilatedPattern.geometric(1024, 3000)
    with pytest.raises(ValueError, match="ratio=1"):
        DilatedPattern.geometric(4, 8, ratio=1)
    with pytest.raises(ValueError, match="min_segment_length=8 and max_segment_length=4"):
        DilatedPattern.geometric(8, 4)


def test_dense_is_one_segment_longer_than_any_sequence():
    assert DilatedPattern(segment_lengths=(DENSE_SEGMENT,), dilation_rates=(1,)).is_dense
    assert not DilatedPattern(segment_lengths=(DENSE_SEGMENT,), dilation_rates=(2,)).is_dense
    assert not DilatedPattern(segment_lengths=(4096,), dilation_rates=(1,)).is_dense
