"""Cases of test_dilated.py, run by every rank."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.parallel import gather_sequence, parallel_dilated_attention
from tests.ops.draws import HALF, Call
from tests.parallel.parity import assert_parts_equal_whole
from tests.parallel.traffic import counting

BASE = Call(segment_lengths=(4, 10, 24), dilation_rates=(1, 3, 5), seq_len=24, head_dim=8)


def attend(q, k, v, pattern, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallel_dilated_attention(q, k, v, pattern, mesh, **options)


def case(call: Call, **options):
    return partial(assert_parts_equal_whole, call, attend, **options)


def of(**fields):
    return Call(**{**vars(BASE), **fields})


def of_powers(**fields):
    """Parts of 8 positions: a multiple of the segments and rates that lie in them."""
    size = {"seq_len": 8 * dist.get_world_size()} if dist.is_initialized() else {}
    powers = {"segment_lengths": (4, 16, 32), "dilation_rates": (1, 2, 4), "head_dim": 16}
    return of(**powers | size | fields)


def traffic_does_not_grow():
    """Bytes that leave a rank, counted in its calls, at 1, 4 and 16 times the length."""
    sent = {}
    for scale in (1, 4, 16):
        length = 24 * scale * dist.get_world_size()
        pattern = DilatedPattern(segment_lengths=(8, length), dilation_rates=(1, 4 * scale))
        q, k, v = (torch.randn(1, 24 * scale, 2, 8, requires_grad=True) for _ in range(3))
        with counting() as traffic:
            attend(q, k, v, pattern, is_causal=True).sum().backward()
        sent[scale] = dict(traffic.sent)
    assert sent[1] == sent[4] == sent[16]
    # 6 rows of 2 heads go to each later rank as keys and values, gradients to each earlier one.
    rank, size = dist.get_rank(), dist.get_world_size()
    row = 2 * 8 * 4
    assert sent[1]["all_to_all"] == 6 * 2 * row * (size - 1 - rank + rank)


def dropout():
    """The gradient is that of the function with the weights dropped in the forward pass."""
    pattern = DilatedPattern(segment_lengths=(4, 24), dilation_rates=(1, 3))
    size = 24 // dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (1, size, 3, 8)
    inputs = torch.randn(3, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    step = 1e-6 * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    factors = torch.randn(shape, generator=generator, dtype=torch.float64)

    def loss(x):
        torch.manual_seed(7)
        out = attend(*x.unbind(), pattern, is_causal=True, dropout_p=0.4)
        return (out * factors).sum()

    grad = torch.autograd.grad(loss(inputs), inputs)[0]
    with torch.no_grad():
        change = torch.stack([loss(inputs + step) - loss(inputs - step), 2 * (grad * step).sum()])
    dist.all_reduce(change)
    torch.testing.assert_close(change[0], change[1], rtol=1e-6, atol=1e-10)


def dropout_differs_between_ranks():
    pattern = DilatedPattern(segment_lengths=(8,), dilation_rates=(1,))
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 8, 2, 4)
    out = attend(q, k, v, pattern, dropout_p=0.5)
    outs = gather_sequence(out, init_device_mesh("cpu", (dist.get_world_size(),))).split(8, dim=1)
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[dist.get_rank()], out)


def pairs_of_a_bias_are_refused():
    q, k, v = torch.randn(3, 1, 4, 2, 4)
    with pytest.raises(NotImplementedError, match=r"function of distances.*\(1, 1, 4, 4\)"):
        attend(q, k, v, BASE.pattern, bias=torch.zeros(1, 1, 4, 4))
    zero = replace(BASE.pattern, padded_keys="zero")
    with pytest.raises(ValueError, match="padded_keys='zero' has no meaning"):
        attend(q, k, v, zero, key_padding_mask=torch.tensor([[True, False, False, False]]))


# Patterns and lengths at which torchscale's sequence parallelism is off by 0.1 and more.
SHORT = {"segment_lengths": (4, 16), "dilation_rates": (1, 2), "seq_len": 16}
CASES = {
    "traffic_does_not_grow": traffic_does_not_grow,
    "dropout": dropout,
    "dropout_differs_between_ranks": dropout_differs_between_ranks,
    "pairs_of_a_bias_are_refused": pairs_of_a_bias_are_refused,
    "own_keys_in_long_branches": case(of(**SHORT, is_causal=True)),
    "first_process_of_a_segment": case(
        of(segment_lengths=(4, 8), dilation_rates=(1, 2), seq_len=16, is_causal=True)
    ),
    "rate_does_not_divide_a_part": case(
        of(segment_lengths=(6, 12), dilation_rates=(1, 4), seq_len=12)
    ),
    "steps_go_on_over_borders": case(
        of(segment_lengths=(4, 12), dilation_rates=(1, 3), seq_len=12)
    ),
    "segment_within_a_part": case(of(segment_lengths=(3, 6), dilation_rates=(1, 2), seq_len=12)),
    "xpos_over_borders": case(of(**SHORT, xpos_scale_base=16.0)),
    # 24 tokens: segments of 4 end on borders of 2 and 3 processes, of 10 inside and across.
    "plain": case(of()),
    "causal": case(of(is_causal=True)),
    "aligned": case(of(segment_lengths=(3, 6, 12, 24), dilation_rates=(1, 2, 4, 8))),
    "aligned_causal": case(
        of(segment_lengths=(3, 6, 12, 24), dilation_rates=(1, 2, 4, 8), is_causal=True)
    ),
    "dense": case(of(segment_lengths=(2**30,), dilation_rates=(1,))),
    "dense_causal": case(of(segment_lengths=(2**30,), dilation_rates=(1,), is_causal=True)),
    "prime_length": case(of(seq_len=23, is_causal=True)),
    "prime_length_not_causal": case(of(seq_len=23)),
    "empty_last_parts": case(of(seq_len=5, is_causal=True), extra=3),
    "two_tokens": case(of(seq_len=2), extra=2),
    "no_rate_1": case(of(segment_lengths=(7, 19), dilation_rates=(2, 3), is_causal=True)),
    "block_offsets": case(of(head_offset="block", num_heads=6, num_kv_heads=6)),
    "zero_keys": case(of(head_offset="block", padded_keys="zero", seq_len=23)),
    "zero_keys_causal": case(of(padded_keys="zero", seq_len=23, is_causal=True)),
    "more_rates_than_heads": case(of(segment_lengths=(5, 22), dilation_rates=(1, 11))),
    "many_heads": case(of(num_heads=7, num_kv_heads=7, is_causal=True)),
    "grouped_queries": case(of(num_heads=6, num_kv_heads=2, is_causal=True)),
    "multi_query": case(of(num_heads=4, num_kv_heads=1)),
    "batch": case(of(batch=3, is_causal=True)),
    "right_padding": case(of(batch=3, padding="right", seq_len=23)),
    "right_padding_causal": case(of(batch=3, padding="right", is_causal=True)),
    "right_padding_zero_keys": case(of(batch=3, padding="right", padded_keys="zero")),
    "left_padding": case(of(batch=2, padding="left", seq_len=23)),
    "random_padding": case(of(batch=2, padding="random", is_causal=True)),
    "one_row_all_padding": case(of(batch=2, padding="one_row_all")),
    "packed": case(of(documents=(4, 1, 1, 13, 5))),
    "packed_causal": case(of(documents=(2, 2, 2, 17, 1), is_causal=True)),
    "packed_with_rest": case(of(seq_len=23, documents=(9, 14), is_causal=True)),
    "xpos": case(of(xpos_scale_base=16.0, is_causal=True)),
    "xpos_nested": case(
        of(segment_lengths=(4, 12), dilation_rates=(1, 3), xpos_scale_base=16.0, is_causal=True)
    ),
    "xpos_not_causal": case(of(xpos_scale_base=16.0, seq_len=23)),
    "alibi": case(of(bias="alibi", is_causal=True)),
    "table": case(of(bias="table", num_heads=6, num_kv_heads=2)),
    "table_and_padding": case(of(bias="table", batch=2, padding="random")),
    "scale": case(of(scale=0.3)),
    "lse_gradient": case(of(is_causal=True), with_lse_grad=True),
    "math": case(of(is_causal=True), backend="math"),
    "float64": case(of(), dtype=torch.float64, tolerance={"atol": 1e-10, "rtol": 1e-10}),
    "bfloat16": case(of(is_causal=True), dtype=torch.bfloat16, tolerance=HALF),
}
