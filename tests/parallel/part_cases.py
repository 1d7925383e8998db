"""Checks of sharding, of tree attention and of `RingAttention` on several ranks."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from longnet_zoo.parallel.layout import (
    gather_sequence,
    part_length,
    positions_of,
    shard_padding_mask,
    shard_sequence,
    shard_text,
)
from longnet_zoo.parallel.ring_layer import RingAttention, ring_mesh
from longnet_zoo.parallel.tree import tree_attention
from tests.parallel.dense import LAYOUTS, assert_near, dense, world_mesh

SEQ_LENS = (1, 2, 7, 12, 13)


def parts_join_to_the_whole():
    mesh = world_mesh()
    for layout in LAYOUTS:
        for seq_len in SEQ_LENS:
            x = torch.randn(3, seq_len, 2)
            for whole in (x, x.bfloat16(), x.double(), x > 0, (9 * x).long()):
                part = shard_sequence(whole, mesh, layout=layout)
                assert part.shape == (3, part_length(seq_len, mesh.size(), layout), 2)
                joined = gather_sequence(part, mesh, layout=layout, seq_len=seq_len)
                assert torch.equal(joined, whole)
            for dim, view in ((0, x.transpose(0, 1)), (2, x.transpose(1, 2)), (-2, x)):
                part = shard_sequence(view, mesh, dim=dim, layout=layout)
                joined = gather_sequence(part, mesh, dim=dim, layout=layout, seq_len=seq_len)
                assert torch.equal(joined, view)


def parts_lie_where_positions_say():
    mesh = world_mesh()
    size = mesh.size()
    for layout in LAYOUTS:
        for seq_len in SEQ_LENS:
            length = part_length(seq_len, size, layout)
            own = positions_of(dist.get_rank(), size, length, layout)
            part = shard_sequence(torch.arange(seq_len), mesh, dim=0, layout=layout, pad_value=-1)
            assert torch.equal(part, torch.where(own < seq_len, own, -1))
            padded = gather_sequence(part, mesh, dim=0, layout=layout)
            order = torch.arange(size * length)
            assert torch.equal(padded, torch.where(order < seq_len, order, -1))


def gradients_are_adjoints():
    """<shard(x), y> = <x, shard'(y)>, and the same of gather, summed over the ranks."""
    mesh = world_mesh()
    for layout in LAYOUTS:
        for seq_len in SEQ_LENS:
            whole = torch.randn(2, seq_len, dtype=torch.float64, requires_grad=True)
            part = shard_sequence(whole, mesh, layout=layout)
            torch.manual_seed(dist.get_rank())  # each rank's own
            to_part, to_whole = torch.randn_like(part), torch.randn_like(whole)
            (grad,) = torch.autograd.grad(part, whole, to_part)
            leaf = part.detach().clone().requires_grad_()
            joined = gather_sequence(leaf, mesh, layout=layout, seq_len=seq_len)
            (back,) = torch.autograd.grad(joined, leaf, to_whole)
            pairs = ((part, to_part), (whole, grad), (joined, to_whole), (leaf, back))
            products = torch.stack([(a * b).sum() for a, b in pairs]).detach()
            dist.all_reduce(products)
            assert_near(products[0], products[1], "shard", 1e-12)
            assert_near(products[2], products[3], "gather", 1e-12)
            torch.manual_seed(0)


def gradients_are_added_in_float32():
    mesh = world_mesh()
    part = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.full((1, mesh.size()), 1.0 if dist.get_rank() == 0 else 2**-8)
    (back,) = torch.autograd.grad(gather_sequence(part, mesh), part, grad.bfloat16())
    # Added one by one in bfloat16, each 2^-8 would be lost.
    expected = torch.tensor(1 + (mesh.size() - 1) * 2**-8).bfloat16()
    assert torch.equal(back, expected.view(1, 1))


def padding_masks_know_what_was_added():
    mesh = world_mesh()
    for layout in LAYOUTS:
        seq_len = 2 * mesh.size()
        none = torch.zeros(3, seq_len, dtype=torch.bool)
        assert shard_padding_mask(None, seq_len, 3, mesh, layout) is None
        assert shard_padding_mask(none, seq_len, 3, mesh, layout) is None
        some = none.clone()
        some[1, -1] = True  # on one rank only, and yet no rank gets None
        part = shard_padding_mask(some, seq_len, 3, mesh, layout)
        assert torch.equal(gather_sequence(part, mesh, layout=layout), some)
        part = shard_padding_mask(None, seq_len - 1, 3, mesh, layout)
        expected = torch.arange(seq_len) >= seq_len - 1
        assert torch.equal(gather_sequence(part, mesh, layout=layout), expected.expand(3, -1))
    with pytest.raises(ValueError, match=re.escape("(3, 8), got torch.int64 (3, 8)")):
        shard_padding_mask(torch.zeros(3, 8, dtype=torch.int64), 8, 3, mesh)


def labels_cross_the_borders():
    mesh = world_mesh()
    size = mesh.size()
    for layout in LAYOUTS:
        tokens = torch.randint(0, 50, (2, 4 * size))
        part, labels = shard_text(tokens, mesh, layout=layout, ignore_index=-7)
        own = positions_of(dist.get_rank(), size, part.shape[1], layout)
        for row in range(2):
            for place, position in enumerate(own.tolist()):
                is_real = position < 4 * size - 1
                assert part[row, place] == (tokens[row, position] if is_real else 0)
                assert labels[row, place] == (tokens[row, position + 1] if is_real else -7)


def wrong_parts_are_refused():
    mesh = world_mesh()
    size = mesh.size()
    with pytest.raises(ValueError, match=f"parts of 1 rows on {size} ranks, got 2 rows"):
        gather_sequence(torch.zeros(1, 2), mesh, seq_len=size)
    with pytest.raises(ValueError, match=r"even number of rows on each rank, got 3"):
        gather_sequence(torch.zeros(1, 3), mesh, layout="zigzag")


def tree_equals_dense_attention():
    mesh, rank, size = world_mesh(), dist.get_rank(), dist.get_world_size()
    for num_queries, num_kv_heads in ((1, 4), (1, 2), (3, 1)):
        for counts in ([5] * size, [0, *range(3, size + 2)], [1] + [0] * (size - 1)):
            q = torch.randn(2, num_queries, 4, 8)
            k, v = torch.randn(2, 2, sum(counts), num_kv_heads, 8)
            k = 30 * k  # logits whose exponentials overflow
            mask = torch.rand(2, sum(counts)) < 0.3
            start = sum(counts[:rank])
            own = slice(start, start + counts[rank])
            for hidden in (None, mask):
                if hidden is not None:
                    k, v = (x.masked_fill(hidden[..., None, None], float("nan")) for x in (k, v))
                out, lse = tree_attention(
                    q,
                    k[:, own],
                    v[:, own],
                    mesh,
                    key_padding_mask=None if hidden is None else hidden[:, own],
                    return_lse=True,
                )
                seen = ~hidden if hidden is not None else torch.ones_like(mask)
                seen = seen[:, None].expand(-1, num_queries, -1)
                expected, expected_lse = dense(q, k.nan_to_num(), v.nan_to_num(), seen)
                assert_near(out, expected, ("out", counts))
                is_empty = expected_lse == float("-inf")
                assert torch.equal(lse == float("-inf"), is_empty)
                lse, expected_lse = (x.masked_fill(is_empty, 0) for x in (lse, expected_lse))
                assert_near(lse, expected_lse, ("lse", counts))


def tree_without_any_key_gives_zeros():
    q, none = torch.randn(2, 1, 4, 8), torch.empty(2, 0, 4, 8)
    out, lse = tree_attention(q, none, none, world_mesh(), return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((2, 1, 4), float("-inf")))


def tree_adds_in_float32():
    q = torch.randn(1, 1, 4, 8).bfloat16()
    k, v = torch.randn(2, 1, 11, 4, 8).bfloat16()
    out = tree_attention(q, k, v, world_mesh())
    assert out.dtype == torch.bfloat16
    # Every rank has the same keys: the mean over the ranks is that of one.
    assert torch.equal(out, tree_attention(q, k, v, None))


def layer_results(layer, x, **options):
    """Output, and the gradients of input and parameters averaged over the ranks of a ring."""
    x = x.clone().requires_grad_()
    out = layer(x, **options)
    weights = torch.randn(
        out.shape[1:], generator=torch.Generator().manual_seed(7), dtype=out.dtype
    )
    grads = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])
    if layer.mesh is not None:
        for grad in grads:
            dist.all_reduce(grad, group=layer.mesh.get_group())
        grads = [grad / layer.mesh.size() for grad in grads]
    return [out.detach(), *grads]


def alone(layer, **options):
    """The same layer on one process."""
    other = RingAttention(12, 3, **options)
    other.mesh = None
    other.load_state_dict(layer.state_dict())
    return other


def layer_shards_by_itself():
    mask = torch.rand(2, 19) < 0.2
    mask[:, 0] = False
    right = torch.arange(19) >= torch.tensor([[19], [11]])
    packed = {"cu_seqlens": torch.tensor([0, 4, 19], dtype=torch.int32)}
    for layout in LAYOUTS:
        for options, inputs in (
            ({}, {}),
            ({"is_causal": False, "num_kv_heads": 1, "bias": True}, {"key_padding_mask": mask}),
            ({"max_lookback": 6, "dim_head": 6}, {"key_padding_mask": right}),
            ({"rotary": False}, packed),
            ({}, {"position_bias": lambda distances: -0.1 * distances.abs().expand(3, -1)}),
        ):
            layer = RingAttention(12, 3, layout=layout, **options)
            x = torch.randn(1 if inputs is packed else 2, 19, 12)
            actual = layer_results(layer, x, **inputs)
            expected = layer_results(alone(layer, **options), x, **inputs)
            for a, b in zip(actual, expected, strict=True):
                assert_near(a, b.double(), (layout, options))


def layer_takes_parts():
    mesh = world_mesh()
    for layout in LAYOUTS:
        layer = RingAttention(12, 3, layout=layout, auto_shard_seq=False, mesh=mesh)
        x = torch.randn(2, 6 * mesh.size(), 12)
        out = gather_sequence(layer(shard_sequence(x, mesh, layout=layout)), mesh, layout=layout)
        assert_near(out, alone(layer)(x).double(), layout)


def rings_of_half_the_ranks():
    """Each ring has a sequence of its own, and stripes as wide as the ring."""
    size, rank = dist.get_world_size(), dist.get_rank()
    ring_size = size // 2 if size % 2 == 0 else 1
    for layout in LAYOUTS:
        torch.manual_seed(0)
        layer = RingAttention(12, 3, layout=layout, ring_size=ring_size)
        assert layer.mesh.size() == ring_size
        assert layer.mesh.get_local_rank() == rank % ring_size
        torch.manual_seed(rank // ring_size)
        x = torch.randn(1, 13, 12)
        for a, b in zip(layer_results(layer, x), layer_results(alone(layer), x), strict=True):
            assert_near(a, b.double(), (layout, ring_size))


def ring_sizes_that_do_not_divide_are_refused():
    size = dist.get_world_size()
    wrong, nearest = {2: (0, "1"), 3: (2, "1 or 3"), 4: (3, "2 or 4")}[size]
    with pytest.raises(ValueError, match=f"{size} ranks, got ring_size={wrong}. Use {nearest}"):
        RingAttention(12, 3, ring_size=wrong)
    with pytest.raises(ValueError, match=f"got ring_size={size + 1}. Use {size}"):
        RingAttention(12, 3, ring_size=size + 1)
    if size == 4:
        pairs = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
        assert ring_mesh(pairs, 2) is pairs
        with pytest.raises(ValueError, match="mesh of 2 ranks, which must then be all 4"):
            ring_mesh(pairs, 1)


def layer_trains_under_ddp():
    """DDP averages what the ranks find: the same step as on one process."""
    layer = RingAttention(12, 3, layout="striped")
    single = alone(layer)
    wrapped = nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(2, 11, 12)
    for _ in range(3):
        for model in (wrapped, single):
            model.zero_grad()
            model(x).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
    for a, b in zip(layer.parameters(), single.parameters(), strict=True):
        assert_near(a.detach(), b.detach().double(), "ddp")


LAYOUT_CASES = (
    parts_join_to_the_whole,
    parts_lie_where_positions_say,
    gradients_are_adjoints,
    gradients_are_added_in_float32,
    padding_masks_know_what_was_added,
    labels_cross_the_borders,
    wrong_parts_are_refused,
)
TREE_CASES = (tree_equals_dense_attention, tree_without_any_key_gives_zeros, tree_adds_in_float32)
LAYER_CASES = (
    layer_shards_by_itself,
    layer_takes_parts,
    rings_of_half_the_ranks,
    ring_sizes_that_do_not_divide_are_refused,
    layer_trains_under_ddp,
)
CASES = {case.__name__: case for case in (*LAYOUT_CASES, *TREE_CASES, *LAYER_CASES)}
