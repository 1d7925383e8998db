"""Checks of ring attention on several ranks, against one dense softmax in float64."""

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from longnet_zoo.ops.kernels import sdpa
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference
from longnet_zoo.parallel import ring_softmax
from longnet_zoo.parallel.layout import (
    gather_sequence,
    shard_padding_mask,
    shard_sequence,
)
from longnet_zoo.parallel.ring import ring_attention
from tests.parallel.dense import LAYOUTS, assert_near, dense, random_qkv, visible, world_mesh


def ring_results(qkvc, *, layout, mask=None, is_padded=True, **options):
    """Out, dq, dk, dv and lse of the whole sequence, from the parts of all ranks."""
    mesh = world_mesh()
    batch, seq_len = qkvc[0].shape[:2]
    *qkv, cotangent = (shard_sequence(x, mesh, layout=layout) for x in qkvc)
    if is_padded:
        mask = shard_padding_mask(mask, seq_len, batch, mesh, layout)
    qkv = [x.clone().requires_grad_() for x in qkv]
    out, lse = ring_attention(
        *qkv, mesh, layout=layout, key_padding_mask=mask, return_lse=True, **options
    )
    grads = torch.autograd.grad((out * cotangent).sum(), qkv)
    results = (x.detach() for x in (out, *grads, lse))
    return [gather_sequence(x, mesh, layout=layout, seq_len=seq_len) for x in results]


def check(*, seq_len, layout, is_causal, mask=None, cu_seqlens=None, max_lookback=None, **sizes):
    """Compares out, lse, dq, dk and dv with the dense softmax."""
    what = (seq_len, layout, is_causal, max_lookback)
    qkvc = random_qkv(seq_len=seq_len, **sizes)
    if mask is not None:  # what lies in the padding must not matter
        qkvc[:3] = [x.masked_fill(mask[:, :, None, None], float("nan")) for x in qkvc[:3]]
    batch = qkvc[0].shape[0]
    actual = ring_results(
        qkvc,
        layout=layout,
        mask=mask,
        is_padded=cu_seqlens is None,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        is_causal=is_causal,
        max_lookback=max_lookback,
    )
    seen = visible(
        batch,
        seq_len,
        is_causal=is_causal,
        max_lookback=max_lookback,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    *qkv, cotangent = (x.double().nan_to_num() for x in qkvc)
    qkv = [x.requires_grad_() for x in qkv]
    out, lse = dense(*qkv, seen)
    expected = (out, *torch.autograd.grad((out * cotangent).sum(), qkv))
    for name, x, y in zip(("out", "dq", "dk", "dv"), actual[:4], expected, strict=True):
        assert_near(x, y, (name, *what))
    is_empty = lse == float("-inf")
    assert torch.equal(actual[4] == float("-inf"), is_empty), what
    assert_near(actual[4].masked_fill(is_empty, 0), lse.masked_fill(is_empty, 0), ("lse", *what))


def whole_sequences():
    size = dist.get_world_size()
    for layout in LAYOUTS:
        for is_causal in (True, False):
            for seq_len in (1, 2 * size, 5 * size + 1, 23):
                check(seq_len=seq_len, layout=layout, is_causal=is_causal)
    check(seq_len=19, layout="striped", is_causal=True, num_kv_heads=4)
    check(seq_len=19, layout="zigzag", is_causal=True, num_kv_heads=1, batch=1)


def look_back():
    for layout in LAYOUTS:
        for max_lookback in (1, 2, 5, 9, 14, 100):
            check(seq_len=29, layout=layout, is_causal=True, max_lookback=max_lookback)


def right_padding():
    lengths = torch.tensor([29, 17, 17, 0, 1])
    mask = torch.arange(29) >= lengths[:, None]
    for layout in LAYOUTS:
        for is_causal in (True, False):
            check(seq_len=29, layout=layout, is_causal=is_causal, mask=mask, batch=5)
    check(seq_len=29, layout="striped", is_causal=True, max_lookback=6, mask=mask, batch=5)


def padding_anywhere():
    mask = torch.rand(3, 29) < 0.4
    mask[0] = False
    mask[1, :20] = True
    for layout in LAYOUTS:
        for is_causal, max_lookback in ((True, None), (False, None), (True, 6)):
            check(
                seq_len=29,
                layout=layout,
                is_causal=is_causal,
                max_lookback=max_lookback,
                mask=mask,
                batch=3,
            )


def packed_sequences():
    for layout in LAYOUTS:
        for bounds in ([0, 1, 9, 10, 29], [0, 13, 24], [0, 29]):
            for is_causal, max_lookback in ((True, None), (False, None), (True, 4)):
                check(
                    seq_len=29,
                    layout=layout,
                    is_causal=is_causal,
                    max_lookback=max_lookback,
                    cu_seqlens=bounds,
                    batch=1,
                )


def distance_bias():
    """Bias by distance, and the gradient of its table, which ranks find in parts."""
    mesh = world_mesh()
    for layout in LAYOUTS:
        for is_causal, max_lookback in ((True, None), (False, None), (True, 7)):
            qkvc = random_qkv(seq_len=26)
            table = torch.randn(4, 61)
            tables = [table.clone().requires_grad_(), table.double().requires_grad_()]
            parts = [shard_sequence(x, mesh, layout=layout) for x in qkvc]
            mask = shard_padding_mask(None, 26, 2, mesh, layout)
            out = ring_attention(
                *parts[:3],
                mesh,
                layout=layout,
                is_causal=is_causal,
                max_lookback=max_lookback,
                key_padding_mask=mask,
                bias=lambda distances, t=tables[0]: t[:, distances.clamp(-30, 30) + 30],
            )
            (out * parts[3]).sum().backward()
            dist.all_reduce(tables[0].grad)
            seen = visible(2, 26, is_causal=is_causal, max_lookback=max_lookback)
            expected, _ = dense(
                *qkvc[:3], seen, lambda distances, t=tables[1]: t[:, distances.clamp(-30, 30) + 30]
            )
            (expected * qkvc[3]).sum().backward()
            out = gather_sequence(out.detach(), mesh, layout=layout, seq_len=26)
            assert_near(out, expected, ("out", layout, is_causal))
            assert_near(tables[0].grad, tables[1].grad, ("table", layout, is_causal))
            assert tables[0].grad.abs().max() > 0.1


def xpos_decay():
    for layout in LAYOUTS:
        for is_causal, bounds in ((True, None), (False, None), (True, [0, 7, 25])):
            qkvc = random_qkv(seq_len=25, batch=1)
            options = {"is_causal": is_causal, "xpos_scale_base": 8.0}
            if bounds:
                options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
            *actual, _ = ring_results(qkvc, layout=layout, is_padded=not bounds, **options)
            *qkv, cotangent = (x.double() for x in qkvc)
            qkv = [x.requires_grad_() for x in qkv]
            pattern = DilatedPattern(segment_lengths=(25,), dilation_rates=(1,))
            out = dilated_attention_reference(*qkv, pattern, **options)
            expected = (out, *torch.autograd.grad((out * cotangent).sum(), qkv))
            for x, y in zip(actual, expected, strict=True):
                # Towards later keys logits grow, up to 3.5^(24/8) times, and their rounding too.
                assert_near(x, y, ("xpos", layout, is_causal, bounds), tolerance=5e-5)


def lse_gradient():
    mesh = world_mesh()
    for layout in LAYOUTS:
        qkvc = random_qkv(seq_len=6 * mesh.size())
        weights = torch.randn(qkvc[0].shape[:3])
        qkv = [shard_sequence(x, mesh, layout=layout).clone().requires_grad_() for x in qkvc[:3]]
        _, lse = ring_attention(*qkv, mesh, layout=layout, is_causal=True, return_lse=True)
        grads = torch.autograd.grad((lse * shard_sequence(weights, mesh, layout=layout)).sum(), qkv)
        whole = [x.double().requires_grad_() for x in qkvc[:3]]
        _, lse = dense(*whole, visible(2, 6 * mesh.size(), is_causal=True))
        expected = torch.autograd.grad((lse * weights).sum(), whole, allow_unused=True)
        for x, y in zip(grads, expected, strict=True):
            x = gather_sequence(x, mesh, layout=layout)
            assert_near(x, torch.zeros_like(x).double() if y is None else y, ("lse", layout))


def dropout_is_drawn_again_in_the_backward_pass():
    """A numeric derivative with the same seed meets the gradient of each input."""
    mesh = world_mesh()
    for layout in LAYOUTS:
        *qkv, cotangent = (
            shard_sequence(x.double(), mesh, layout=layout)
            for x in random_qkv(seq_len=8 * mesh.size())
        )

        def loss(*qkv, layout=layout, cotangent=cotangent):
            torch.manual_seed(5)
            out = ring_attention(*qkv, mesh, layout=layout, is_causal=True, dropout_p=0.4)
            return (out * cotangent).sum()

        leaves = [x.clone().requires_grad_() for x in qkv]
        grads = torch.autograd.grad(loss(*leaves), leaves)
        for index, grad in enumerate(grads):
            direction = torch.randn_like(grad)
            near = [[*qkv] for _ in range(2)]
            near[0][index] = qkv[index] + 1e-6 * direction
            near[1][index] = qkv[index] - 1e-6 * direction
            change = torch.stack(
                [(loss(*near[0]) - loss(*near[1])) / 2e-6, (grad * direction).sum()]
            )
            dist.all_reduce(change)
            assert_near(change[0], change[1], ("dropout", layout, index), 1e-6)


def ranks_draw_their_own_dropout():
    mesh = world_mesh()
    torch.manual_seed(3)  # the same on every rank, like the parts
    q, k, v, _ = random_qkv(seq_len=11)
    out = ring_attention(q, k, v, mesh, dropout_p=0.5)
    parts = gather_sequence(out, mesh).chunk(mesh.size(), dim=1)
    assert not torch.equal(parts[0], parts[1])
    again = ring_attention(q, k, v, mesh)
    assert torch.allclose(*gather_sequence(again, mesh).chunk(mesh.size(), dim=1)[:2])


def half_precision_error_does_not_grow_with_the_hops():
    qkvc = random_qkv(seq_len=96, head_dim=16, dtype=torch.bfloat16)
    *qkv, cotangent = (x.double() for x in qkvc)
    qkv = [x.requires_grad_() for x in qkv]
    out, _ = dense(*qkv, visible(2, 96, is_causal=True))
    expected = (out, *torch.autograd.grad((out * cotangent).sum(), qkv))
    alone = [x.clone().requires_grad_() for x in qkvc[:3]]
    out = ring_attention(*alone, None, is_causal=True)
    one = (out, *torch.autograd.grad((out * qkvc[3]).sum(), alone))
    for layout in LAYOUTS:
        many = ring_results(qkvc, layout=layout, is_causal=True)[:4]
        for name, x, y, z in zip(("out", "dq", "dk", "dv"), many, one, expected, strict=True):
            assert x.dtype == torch.bfloat16
            errors = [(t.double() - z).norm().item() for t in (x, y)]
            assert errors[0] <= 1.5 * errors[1], (name, layout, errors)


def sent_bytes(*, dtype=torch.float32, **options):
    """Bytes that this rank sends in a forward and a backward pass."""
    mesh = world_mesh()
    sent, start = [0, 0], ring_softmax.Ring.start
    is_backward = False

    def counted(self, sends, receipts):
        sent[is_backward] += sum(x.nbytes for x, _ in sends)
        return start(self, sends, receipts)

    ring_softmax.Ring.start = counted
    try:
        leaves = [torch.randn(1, 10, 2, 4).to(dtype).requires_grad_() for _ in range(3)]
        out = ring_attention(*leaves, mesh, **options)
        is_backward = True
        out.sum().backward()
    finally:
        ring_softmax.Ring.start = start
    return sent


def only_what_is_seen_is_sent():
    size, rank = dist.get_world_size(), dist.get_rank()
    part = 2 * 10 * 2 * 4 * 4  # keys and values of a rank, float32
    assert sent_bytes(is_causal=False)[0] == (size - 1) * part
    # The keys of the ranks up to this one go on, each up to the last rank.
    forward, backward = sent_bytes(is_causal=True)
    assert forward == (0 if rank == size - 1 else (rank + 1) * part)
    # Keys once more, and the gradients of the keys that came.
    assert backward == forward + rank * part
    # Keys in half precision; their gradients, which add up on the way, in float32.
    half_forward, half_backward = sent_bytes(is_causal=True, dtype=torch.bfloat16)
    assert half_forward == forward / 2
    assert half_backward == forward / 2 + rank * part
    # The first query of a rank sees 10 keys of the rank before, or 11 of the two before.
    assert sent_bytes(is_causal=True, max_lookback=1) == [0, 0]
    forward, backward = sent_bytes(is_causal=True, max_lookback=11)
    assert forward == (0 if rank == size - 1 else part)
    assert backward == forward + (0 if rank == 0 else part)
    forward, _ = sent_bytes(is_causal=True, max_lookback=12)
    assert forward == (0 if rank == size - 1 else min(rank + 1, 2) * part)
    # Where the last rank has padding only, its keys stay, and those of the others pass it by need.
    mask = torch.full((1, 10), rank == size - 1)
    forward = torch.tensor(sent_bytes(is_causal=False, key_padding_mask=mask)[0])
    dist.all_reduce(forward)
    assert forward == size * (size - 2) * part


def messages_travel_while_ranks_compute():
    events, start, forward = [], ring_softmax.Ring.start, sdpa.forward

    class Recorded:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            self.work.wait()

    def recorded_start(self, sends, receipts):
        events.append("start")
        return [Recorded(work) for work in start(self, sends, receipts)]

    def recorded_forward(*args):
        events.append("compute")
        return forward(*args)

    ring_softmax.Ring.start, sdpa.forward = recorded_start, recorded_forward
    try:
        q, k, v, _ = random_qkv(seq_len=6, num_kv_heads=4)
        ring_attention(q, k, v, world_mesh())
    finally:
        ring_softmax.Ring.start, sdpa.forward = start, forward
    size = dist.get_world_size()
    one_round = ["start", "compute", "wait", "wait"]  # one message goes, one comes
    assert events == one_round * (size - 1) + ["start", "compute"]


def checkpointing_changes_nothing():
    mesh = world_mesh()
    qkvc = random_qkv(seq_len=7 * mesh.size())
    qkv = [shard_sequence(x, mesh).clone().requires_grad_() for x in qkvc[:3]]

    def attend(q, k, v):
        return ring_attention(q * 1.0, k, v, mesh, is_causal=True)

    plain = torch.autograd.grad(attend(*qkv).square().sum(), qkv)
    again = checkpoint(attend, *qkv, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(again.square().sum(), qkv), plain, strict=True):
        assert torch.equal(x, y)


CASES = {
    case.__name__: case
    for case in (
        whole_sequences,
        look_back,
        right_padding,
        padding_anywhere,
        packed_sequences,
        distance_bias,
        xpos_decay,
        lse_gradient,
        dropout_is_drawn_again_in_the_backward_pass,
        ranks_draw_their_own_dropout,
        half_precision_error_does_not_grow_with_the_hops,
        only_what_is_seen_is_sent,
        messages_travel_while_ranks_compute,
        checkpointing_changes_nothing,
    )
}
