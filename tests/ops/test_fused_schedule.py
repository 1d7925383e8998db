"""The tables that the Triton kernels read, on integers."""

from longnet_zoo.ops import fused_schedule as module
from longnet_zoo.ops.fused_schedule import Launch, fused_schedule
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.sequences import SequenceGroup


def batch_of(*lengths):
    return tuple(
        SequenceGroup(is_packed=False, first=row, count=1, length=length)
        for row, length in enumerate(lengths)
    )


def test_the_branch_of_rate_one_comes_last_and_has_no_partials():
    pattern = DilatedPattern(segment_lengths=(4, 8, 20), dilation_rates=(2, 1, 3))
    schedule = fused_schedule(pattern, batch_of(21), 5, False)
    assert schedule.branches.tolist() == [[4, 2], [20, 3], [8, 1]]
    assert schedule.offsets.tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 0, 1], [0] * 5]
    assert schedule.attends
    # Five segments of two rows and a tail of one, then one of seven rows and a tail of one.
    assert schedule.sequences.tolist() == [[0, 0, 21, 0, 11]]
    assert schedule.num_partials == 11 + 8


def test_without_rate_one_the_last_branch_merges_only():
    pattern = DilatedPattern(segment_lengths=(4,), dilation_rates=(2,))
    schedule = fused_schedule(pattern, batch_of(6), 2, False)
    assert not schedule.attends
    assert schedule.branches.tolist()[-1][1] == 1
    assert schedule.num_tiles(schedule.last, 6, 4) == 2


def test_sequences_of_similar_length_share_a_launch():
    pattern = DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 2))
    schedule = fused_schedule(pattern, batch_of(3, 100, 2, 65), 1, False)
    assert schedule.sequences[:, :3].tolist() == [[1, 0, 100], [3, 0, 65], [0, 0, 3], [2, 0, 2]]
    assert schedule.launches == (
        Launch(first=0, count=2, max_length=100),
        Launch(first=2, count=2, max_length=3),
    )


def test_packed_sequences_start_where_they_lie():
    groups = (
        SequenceGroup(is_packed=True, first=0, count=2, length=3),
        SequenceGroup(is_packed=True, first=6, count=1, length=5),
    )
    pattern = DilatedPattern(segment_lengths=(4,), dilation_rates=(1,))
    schedule = fused_schedule(pattern, groups, 1, False)
    assert schedule.sequences.tolist() == [[0, 6, 5], [0, 0, 3], [0, 3, 3]]
    assert schedule.num_partials == 0


def test_tiles_count_what_every_segment_needs():
    pattern = DilatedPattern(segment_lengths=(10, 40), dilation_rates=(1, 3))
    schedule = fused_schedule(pattern, batch_of(57), 1, False)
    coarse, last = schedule.lengths.index((40, 3)), schedule.last
    # 14 rows and a tail of 6; five segments of 10 and a tail of 7.
    assert schedule.num_tiles(coarse, 57, 4) == 4 + 2
    assert schedule.num_tiles(last, 57, 4) == 5 * 3 + 2
    assert schedule.num_tiles(last, 7, 4) == 2


def test_a_launch_has_no_more_sequences_than_a_grid(monkeypatch):
    monkeypatch.setattr(module, "_MAX_SEQUENCES", 2)
    pattern = DilatedPattern(segment_lengths=(4, 9), dilation_rates=(1, 3))
    schedule = fused_schedule(pattern, batch_of(5, 7, 6, 4, 3), 1, False)
    assert [(launch.first, launch.count, launch.max_length) for launch in schedule.launches] == [
        (0, 2, 7),
        (2, 2, 5),
        (4, 1, 3),
    ]


def test_segments_longer_than_any_sequence_fit_the_tables():
    pattern = DilatedPattern(segment_lengths=(4, 2**33), dilation_rates=(1, 2))
    schedule = fused_schedule(pattern, batch_of(10), 1, False)
    assert schedule.branches.tolist() == [[2**30, 2], [4, 1]]
