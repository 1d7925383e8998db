"""Branches beyond dilation against the oracle: results, gradients, leaks and refusals."""

import hypothesis
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import longnet_zoo as lz
from benchmarks.measure import peak_extra_mib
from longnet_zoo.ops.branches import BigBirdBlocks, BlockSparse, HashBuckets, TokenSubset
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference

from .branch_draws import KINDS, BranchedCall, assert_branched_parity, branched_calls
from .draws import FLOAT32, Call

PATTERN = DilatedPattern(segment_lengths=(64, 256), dilation_rates=(1, 2))


def make_call(**options) -> Call:
    """Grouped queries, and tokens that neither segments nor blocks divide."""
    defaults = {"segment_lengths": (7, 15), "dilation_rates": (1, 3), "seq_len": 41}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    return Call(**{**defaults, **heads, "batch": 2, "seed": 5, **options})


def draw_qkv(*shape: int, num: int = 3) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(num)]


@hypothesis.given(branched=branched_calls())
@hypothesis.settings(max_examples=60)
def test_any_call_agrees_with_the_oracle(branched):
    assert_branched_parity(branched)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_agrees_with_the_oracle_over_many_tiles(kind, is_causal):
    # Tiles have 32 rows or more: buckets and subsets fill several, blocks too.
    call = make_call(seq_len=331, segment_lengths=(33, 100), is_causal=is_causal)
    assert_branched_parity(BranchedCall(call=call, kinds=(kind,), block_size=37))


@pytest.mark.parametrize("padding", ["right", "left", "random"])
def test_padding_agrees_with_the_oracle_over_many_tiles(padding):
    call = make_call(seq_len=211, is_causal=True, padding=padding)
    assert_branched_parity(BranchedCall(call=call, kinds=KINDS, block_size=19))


def test_blocks_larger_than_a_tile_agree_with_the_oracle():
    call = make_call(seq_len=900, batch=1, num_heads=1, num_kv_heads=1, is_causal=True)
    assert_branched_parity(BranchedCall(call=call, kinds=("blocks",), block_size=283))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_agree_with_the_oracle(dtype):
    call = make_call(is_causal=True)
    # A hash of rounded vectors is another one: the oracle hashes the same rounded vectors.
    assert_branched_parity(BranchedCall(call=call, kinds=KINDS), dtype)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_named_kernels_agree_with_the_oracle(backend):
    branched = BranchedCall(call=make_call(seq_len=200), kinds=KINDS, block_size=20)
    inputs = branched.call.inputs(torch.float32)
    branches = branched.branches()
    with torch.no_grad():
        q, k, v = inputs.values()
        out = lz.dilated_attention(
            q, k, v, branched.call.pattern, backend=backend, extra_branches=branches
        )
        expected = dilated_attention_reference(
            q, k, v, branched.call.pattern, extra_branches=branched.branches(for_op=False)
        )
    torch.testing.assert_close(out.double(), expected, **FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_two_dilated_branches_are_exact(kind):
    sizes = {"seq_len": 7, "batch": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 2}
    call = make_call(segment_lengths=(3, 6), dilation_rates=(1, 2), is_causal=True, **sizes)
    branched = BranchedCall(call=call, kinds=(kind,), block_size=3)
    inputs = call.inputs(torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = lz.dilated_attention(
            q,
            k,
            v,
            call.pattern,
            is_causal=True,
            return_lse=True,
            extra_branches=branched.branches(),
        )
        return out, lse

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


def long_branches(seq_len: int) -> list[tuple[object, ...]]:
    kept = [torch.rand(2, seq_len, 3) < 0.5 for _ in range(2)]
    return [
        (HashBuckets(num_buckets=4, num_rounds=2),),
        (HashBuckets(num_buckets=2, seed=1),),
        (BigBirdBlocks(block_size=33),),
        (BigBirdBlocks(block_size=300, num_random=0),),
        (TokenSubset(queries=kept[0], keys=kept[1]),),
    ]


@pytest.mark.parametrize("pattern", [None, PATTERN])
@pytest.mark.parametrize("number", range(5))
def test_no_earlier_output_moves_by_a_bit(number, pattern):
    qkv = draw_qkv(2, 700, 3, 16)
    branches = long_branches(700)[number]

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return lz.dilated_attention(
            *tensors, pattern, is_causal=True, return_lse=True, extra_branches=branches
        )

    out, lse = attend(*qkv)
    for first in (1, 256, 317, 699):
        changed = [x.clone() for x in qkv]
        for x in changed:  # its hash changes, and with it the rows of buckets
            x[:, first : first + 5] = 3 * torch.randn_like(x[:, first : first + 5])
        new_out, new_lse = attend(*changed)
        assert torch.equal(new_out[:, :first], out[:, :first])
        assert torch.equal(new_lse[:, :first], lse[:, :first])
        assert not torch.equal(new_out[:, first:], out[:, first:])


def test_a_perturbed_token_moves_only_outputs_of_its_buckets():
    q, k, v = draw_qkv(1, 300, 1, 8)
    branches = (HashBuckets(num_buckets=4),)
    moved_v = v.clone()
    moved_v[:, 77] += 1.0
    counts = [
        lz.dilated_attention(q, k, x, None, extra_branches=branches).squeeze() for x in (v, moved_v)
    ]
    is_moved = (counts[0] != counts[1]).any(-1)
    one_hot = torch.zeros_like(v)
    one_hot[:, 77] = 1.0
    sees = dilated_attention_reference(q, k, one_hot, None, extra_branches=branches).squeeze() > 0
    assert torch.equal(is_moved, sees.any(-1))
    assert 0 < is_moved.sum() < 150


def test_a_permuted_batch_gives_permuted_results():
    qkv = draw_qkv(3, 90, 2, 8)
    branches = (HashBuckets(num_buckets=4), BigBirdBlocks(block_size=8))
    order = torch.tensor([2, 0, 1])
    out = lz.dilated_attention(*qkv, PATTERN, extra_branches=branches)
    permuted = lz.dilated_attention(*(x[order] for x in qkv), PATTERN, extra_branches=branches)
    torch.testing.assert_close(permuted, out[order])


def test_a_padded_batch_equals_its_sequences_one_by_one():
    qkv = draw_qkv(2, 70, 2, 8)
    branches = (HashBuckets(num_buckets=4), BigBirdBlocks(block_size=8, num_random=3))
    mask = torch.arange(70) >= torch.tensor([[70], [41]])
    out = lz.dilated_attention(*qkv, PATTERN, key_padding_mask=mask, extra_branches=branches)
    short = [x[1:, :41] for x in qkv]
    alone = lz.dilated_attention(*short, PATTERN, extra_branches=branches)
    torch.testing.assert_close(out[1:, :41], alone)
    assert not out[1, 41:].any()


def test_nan_in_padding_stays_there():
    q, k, v = draw_qkv(1, 60, 2, 8)
    mask = torch.zeros(1, 60, dtype=torch.bool)
    mask[:, :7] = True
    for x in (q, k, v):
        x[:, :7] = float("nan")
        x.requires_grad_()
    branches = (
        HashBuckets(num_buckets=4),
        BigBirdBlocks(block_size=8),
        TokenSubset(keys=~mask[..., None].expand(-1, -1, 2)),
    )
    out = lz.dilated_attention(q, k, v, None, key_padding_mask=mask, extra_branches=branches)
    grads = torch.autograd.grad(out[:, 7:].sum(), (q, k, v))
    assert out.isfinite().all()
    assert not out[:, :7].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_rows_that_see_nothing_are_zero():
    nobody = torch.zeros(1, 30, 2, dtype=torch.bool)
    branches = (
        TokenSubset(queries=nobody),
        BlockSparse(block_mask=torch.zeros(3, 3) > 0, block_size=10),
    )
    out, lse = lz.dilated_attention(
        *draw_qkv(1, 30, 2, 4), None, return_lse=True, extra_branches=branches
    )
    assert not out.any()
    assert lse.isneginf().all()


def test_all_blocks_or_all_tokens_are_dense_attention():
    q, k, v = draw_qkv(1, 100, 2, 8)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    everybody = torch.ones(1, 100, 2, dtype=torch.bool)
    for branch in (
        BlockSparse(block_mask=torch.ones(9, 9, dtype=torch.bool), block_size=12),
        TokenSubset(keys=everybody),
        TokenSubset(queries=everybody),
    ):
        out = lz.dilated_attention(q, k, v, None, is_causal=True, extra_branches=(branch,))
        torch.testing.assert_close(out, dense)


def test_memory_grows_linearly():
    def peak_mib(seq_len: int) -> float:
        qkv = [x.requires_grad_() for x in draw_qkv(1, seq_len, 1, 16)]
        branches = (HashBuckets(num_buckets=seq_len // 64), BigBirdBlocks(block_size=64))

        def run() -> None:
            out = lz.dilated_attention(*qkv, None, is_causal=True, extra_branches=branches)
            torch.autograd.grad(out.sum(), qkv)

        return peak_extra_mib(run)

    # All pairs of 8192 tokens alone take 256 MiB.
    assert peak_mib(8192) < min(2.3 * peak_mib(4096), 64)


@pytest.mark.parametrize("has_pattern", [False, True])
def test_compiled_call_equals_the_eager_one(has_pattern):
    pattern = PATTERN if has_pattern else None

    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        branches = (
            HashBuckets(num_buckets=4),
            BigBirdBlocks(block_size=16),
            TokenSubset(keys=kept),
        )
        return lz.dilated_attention(q, k, v, pattern, is_causal=True, extra_branches=branches)

    counter = CompileCounterWithBackend("aot_eager")
    compiled_attend = torch.compile(attend, fullgraph=True, backend=counter)
    for seq_len in (90, 130, 200, 333):
        qkv = [x.requires_grad_() for x in draw_qkv(1, seq_len, 2, 8)]
        kept = torch.rand(1, seq_len, 2) < 0.5
        found = []
        for run in (attend, compiled_attend):
            out = run(*qkv, kept)
            found.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
        for eager, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager)
    assert counter.frame_count <= 2  # one for the first length, one for all others


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_each_kind_agrees_with_the_oracle_on_a_gpu(is_causal, dtype):
    call = make_call(seq_len=331, head_dim=64, is_causal=is_causal, padding="right", device="cuda")
    for kind in KINDS:
        assert_branched_parity(BranchedCall(call=call, kinds=(kind,), block_size=37), dtype)


def test_autocast_changes_nothing():
    qkv = draw_qkv(1, 50, 2, 8)
    branches = (HashBuckets(num_buckets=4),)
    out = lz.dilated_attention(*qkv, None, extra_branches=branches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lz.dilated_attention(*qkv, None, extra_branches=branches)
    assert torch.equal(cast, out)
