"""Which rank holds which tokens: on integers here, on tensors of several ranks in `part_cases`."""

import pytest
import torch

from longnet_zoo.parallel.layout import Run, part_length, positions_of, runs_of, shard_text
from tests.parallel import part_cases
from tests.parallel.dense import LAYOUTS
from tests.parallel.torchrun import check_case


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("case", [case.__name__ for case in part_cases.LAYOUT_CASES])
def test_parts_of_processes(tmp_path_factory, case, world_size):
    check_case(tmp_path_factory, part_cases.__name__, world_size, case)


def test_layouts_by_hand():
    def held(layout):
        return [positions_of(rank, 2, 4, layout).tolist() for rank in range(2)]

    assert held("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert held("striped") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert held("zigzag") == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert runs_of(1, 3, 4, "zigzag") == (Run(2, 1, 2), Run(8, 1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_each_position_once(layout):
    for world_size in range(1, 6):
        for seq_len in (1, 2, 9, 10, 11, 40):
            length = part_length(seq_len, world_size, layout)
            ranks = [positions_of(rank, world_size, length, layout) for rank in range(world_size)]
            assert all(len(rank) == length for rank in ranks)
            assert sorted(torch.cat(ranks).tolist()) == list(range(world_size * length))
            chunks = 2 * world_size if layout == "zigzag" else world_size
            assert world_size * length - seq_len < chunks


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_causal_work_is_balanced(layout):
    def work(layout):
        return [int((positions_of(rank, 4, 16, layout) + 1).sum()) for rank in range(4)]

    assert max(work(layout)) <= 1.1 * min(work(layout))
    assert max(work("contiguous")) > 6 * min(work("contiguous"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: part_length(0, 4), "seq_len=0 and world_size=4"),
        (lambda: part_length(5, 0), "seq_len=5 and world_size=0"),
        (lambda: part_length(5, 4, "spiral"), "got 'spiral'"),
        (lambda: runs_of(4, 4, 6, "striped"), "rank=4 and world_size=4"),
        (lambda: runs_of(0, 4, 7, "zigzag"), "got 7.*= 8 tokens"),
        (lambda: positions_of(0, 4, 7, "zig"), "got 'zig'"),
        (lambda: shard_text(torch.zeros(2, 1), None), r"got \(2, 1\)"),
    ],
)
def test_bad_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
