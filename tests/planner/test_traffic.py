import numpy as np
import pytest

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.planner import layer_traffic
from tests.parallel.torchrun import check_case

CASES = [
    "dilated",
    "dilated_with_shared_keys_in_half",
    "dilated_run_again",
    "ring",
    "ring_striped_with_shared_keys_in_half",
    "ring_zigzag_run_again",
    "all_to_all",
    "all_to_all_with_shared_keys_in_half",
    "averaged_gradients",
    "sharded_parameters",
]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_the_counted_ones(tmp_path_factory, world_size, case):
    check_case(tmp_path_factory, "tests.planner.traffic_cases", world_size, case)


def count(method, *, seq_len, num_ranks, num_kv_heads=4, layout="contiguous"):
    return layer_traffic(
        method,
        pattern=DilatedPattern.geometric(64, 4096),
        seq_len=seq_len,
        num_ranks=num_ranks,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        is_causal=True,
        item_size=2,
        layout=layout,
    )


def test_bytes_of_dilated_do_not_grow_with_the_length():
    short, long = (count("dilated", seq_len=8 * n, num_ranks=8) for n in (4096 + 64, 65_536 + 64))
    assert 0 < long.forward_sent.max() <= short.forward_sent.max()
    dense = [count("ring", seq_len=8 * n, num_ranks=8) for n in (4096, 65_536)]
    assert dense[1].forward_sent.max() == 16 * dense[0].forward_sent.max()


@pytest.mark.parametrize("method", ["dilated", "ring", "all_to_all"])
def test_one_rank_sends_and_holds_nothing(method):
    traffic = count(method, seq_len=1000, num_ranks=1, num_kv_heads=2)
    for x in vars(traffic).values():
        assert x.tolist() == [0]


def test_causal_keys_go_no_further_than_they_are_seen():
    traffic = count("ring", seq_len=400, num_ranks=4)
    keys = 2 * 100 * 4 * 8 * 2
    assert (traffic.forward_sent == keys * np.array([1, 2, 3, 0])).all()
    assert (traffic.forward_received == keys * np.array([0, 1, 2, 3])).all()
