"""The branches themselves: what they let see, count, hash and refuse."""

import pytest
import torch

import longnet_zoo as lz
from longnet_zoo.ops.branch_checks import check_extra_branches
from longnet_zoo.ops.branches import (
    BigBirdBlocks,
    BlockSparse,
    HashBuckets,
    TokenSubset,
    make_branches,
)
from longnet_zoo.ops.seeded import hash_labels

from .largest_tensor import LargestTensor

MASK = torch.eye(3, dtype=torch.bool)
KEPT = torch.ones(1, 12, 2, dtype=torch.bool)


def attend(branch, *, seq_len: int = 12, **options):
    q, k, v = torch.randn(3, 1, seq_len, 2, 4).unbind(0)
    return lz.dilated_attention(q, k, v, None, extra_branches=(branch,), **options)


def test_big_bird_sees_a_window_and_global_blocks():
    rule = BigBirdBlocks(block_size=10, num_window=1, num_global=1, num_random=0)
    branch = rule.for_length(51)
    expected = [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
        [1, 0, 0, 0, 1, 1],
    ]
    assert branch.block_mask.int().tolist() == expected
    assert branch.block_size == 10


def test_big_bird_draws_earlier_blocks_that_see_back():
    rule = BigBirdBlocks(block_size=1, num_window=0, num_global=0, num_random=3, seed=7)
    mask = rule.for_length(200).block_mask
    assert torch.equal(mask, mask.T)
    assert mask.diagonal().all()
    drawn = mask.tril(-1).sum(1)
    assert drawn.max() == 3
    assert drawn[20:].float().mean() > 2.5
    # Anywhere before the block, not only near it.
    rows, columns = mask.tril(-1).nonzero().T
    assert 0.4 < (columns / rows).mean() < 0.6


def test_big_bird_mask_of_a_short_sequence_is_a_corner_of_a_longer_one():
    rule = BigBirdBlocks(block_size=8)
    assert torch.equal(rule.for_length(96).block_mask, rule.for_length(400).block_mask[:12, :12])


def test_big_bird_lists_the_pairs_of_its_mask_once_in_order():
    rule = BigBirdBlocks(block_size=8, num_window=2, num_global=3, num_random=4)
    for num_blocks in (1, 2, 5, 40):
        pairs = rule.block_pairs(num_blocks)
        assert torch.equal(pairs, rule.for_length(8 * num_blocks).block_mask.nonzero().T)


def test_big_bird_is_listed_and_counted_without_a_mask_of_all_blocks(monkeypatch):
    rule, num_blocks = BigBirdBlocks(block_size=4), 2**14  # 2**28 pairs
    with LargestTensor() as largest:
        pairs = rule.attended_pairs(4 * num_blocks, 1, is_causal=True)
    assert largest.numel < 20 * num_blocks
    assert 10 < pairs / (4 * num_blocks) < 30
    monkeypatch.setattr(BigBirdBlocks, "for_length", None)
    attend(rule)  # nor does the op make one


def test_layers_draw_by_seeds_of_their_own():
    rule, buckets = BigBirdBlocks(block_size=8, seed=3), HashBuckets(num_buckets=8, seed=2**63 - 1)
    assert (rule.for_layer(0), buckets.for_layer(0)) == (rule, buckets)
    masks = [rule.for_layer(layer).for_length(400).block_mask for layer in range(3)]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    x = torch.randn(1, 500, 2, 16)
    options = {"num_kv_heads": 2, "num_buckets": 8, "num_rounds": 1}
    labels = [hash_labels(x, seed=buckets.for_layer(i).seed, **options) for i in range(2)]
    assert (labels[0] == labels[1]).float().mean() < 0.25
    # The generator reads the lower 32 bits: those differ between all layers of a stack.
    assert len({rule.for_layer(layer).seed % 2**32 for layer in range(1000)}) == 1000


def test_big_bird_seed_changes_the_random_blocks():
    masks = [BigBirdBlocks(block_size=8, seed=seed).for_length(400).block_mask for seed in (0, 1)]
    assert not torch.equal(*masks)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_pairs_of_blocks_are_counted(heads, is_causal):
    branch = BlockSparse(block_mask=torch.rand(*heads, 5, 5) < 0.5, block_size=4)
    blocks = torch.arange(18) // 4
    seen = branch.block_mask.expand(2, 5, 5)[:, blocks[:, None], blocks]
    expected = int((seen.tril() if is_causal else seen).sum())
    assert branch.attended_pairs(18, 2, is_causal=is_causal) == expected


def test_pairs_of_big_bird_are_those_of_its_mask():
    rule = BigBirdBlocks(block_size=4)
    expected = rule.for_length(50).attended_pairs(50, 3, is_causal=True)
    assert rule.attended_pairs(50, 3, is_causal=True) == expected > 0


def test_pairs_of_buckets_are_those_of_even_ones():
    buckets = HashBuckets(num_buckets=4, num_rounds=3)
    assert buckets.attended_pairs(40, 2) == 2 * 3 * 40 * 40 / 4
    assert buckets.attended_pairs(40, 2, is_causal=True) == 2 * 3 * 40 * 41 / 2 / 4


def test_hash_is_equal_for_equal_directions_and_spreads_others():
    options = {"num_kv_heads": 2, "num_buckets": 8, "num_rounds": 3, "seed": 0}
    x = torch.randn(1, 4000, 2, 16)
    labels = hash_labels(x, **options)
    assert labels.shape == (3, 1, 4000, 2)
    assert torch.equal(hash_labels(7.5 * x, **options), labels)
    opposite = hash_labels(-x, **options)
    assert torch.equal((opposite - labels).abs(), torch.full_like(labels, 4))
    shares = torch.bincount(labels.flatten(), minlength=8) / labels.numel()
    assert ((shares > 0.1) & (shares < 0.15)).all()
    near = hash_labels(x + 0.1 * torch.randn_like(x), **options)
    assert (near == labels).float().mean() > 0.8


def test_hash_differs_by_round_head_and_seed():
    options = {"num_kv_heads": 2, "num_buckets": 16, "num_rounds": 2}
    x = torch.randn(1, 500, 1, 16).expand(1, 500, 2, 16)
    labels = hash_labels(x, seed=0, **options)
    others = (labels[0], labels[1]), (labels[..., 0], labels[..., 1])
    for one, other in (*others, (labels, hash_labels(x, seed=1, **options))):
        assert (one == other).float().mean() < 0.2


def test_query_heads_share_the_hash_of_their_key_head():
    x = torch.randn(1, 50, 1, 8).expand(1, 50, 4, 8)
    labels = hash_labels(x, num_kv_heads=2, num_buckets=16, num_rounds=1, seed=0)
    assert torch.equal(labels[..., 0], labels[..., 1])
    assert not torch.equal(labels[..., 1], labels[..., 2])


def test_long_sequences_are_hashed_in_parts(monkeypatch):
    x = torch.randn(2, 50, 4, 8)
    options = {"num_kv_heads": 2, "num_buckets": 16, "num_rounds": 2, "seed": 0}
    whole = hash_labels(x, **options)
    monkeypatch.setattr("longnet_zoo.ops.seeded._MAX_PRODUCTS", 1000)
    assert torch.equal(hash_labels(x, **options), whole)


def test_branches_are_made_of_mappings():
    made = make_branches(
        [{"kind": "hash_buckets", "num_buckets": 8}, {"kind": "big_bird", "block_size": 32}]
    )
    assert made == (HashBuckets(num_buckets=8), BigBirdBlocks(block_size=32))
    assert make_branches(made) == made


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (HashBuckets(num_buckets=2), TypeError, "a tuple of branches, got HashBuckets"),
        ([{"kind": "hash"}], TypeError, "with a kind among .*'hash_buckets'.*, got kind='hash'"),
        ([TokenSubset(keys=KEPT)], TypeError, "BigBirdBlocks or HashBuckets, .* got TokenSubset"),
        ([{"kind": "big_bird", "size": 3}], TypeError, r"big_bird has no fields \['size'\]"),
    ],
)
def test_other_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        make_branches(options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: HashBuckets(num_buckets=7), ValueError, "num_buckets must be even, got 7"),
        (lambda: HashBuckets(num_buckets=0), ValueError, "num_buckets must be at least 2, got 0"),
        (lambda: HashBuckets(num_buckets=4.0), TypeError, "must be an integer, got 4.0"),
        (lambda: HashBuckets(num_buckets=4, num_rounds=0), ValueError, "num_rounds .* got 0"),
        (lambda: HashBuckets(num_buckets=4, seed=-1), ValueError, "seed must be .* got -1"),
        (lambda: BigBirdBlocks(seed=2**63), ValueError, r"seed must be below 2\*\*63, got 922"),
        (lambda: HashBuckets(num_buckets=4, kind="x"), ValueError, "'hash_buckets', got 'x'"),
        (lambda: BigBirdBlocks(kind="x"), ValueError, "BigBirdBlocks must be 'big_bird', got 'x'"),
        (lambda: BigBirdBlocks(block_size=0), ValueError, "block_size must be at least 1, got 0"),
        (lambda: BigBirdBlocks(num_random=-1), ValueError, "num_random .* got -1"),
        (lambda: BlockSparse(block_mask=MASK, block_size=0), ValueError, "block_size .* got 0"),
        (lambda: BlockSparse(block_mask=MASK[:2], block_size=4), ValueError, r"got \(2, 3\)"),
        (lambda: BlockSparse(block_mask=MASK.int(), block_size=4), TypeError, "got torch.int32"),
        (lambda: BlockSparse(block_mask=[[True]], block_size=4), TypeError, "tensor, got list"),
        (lambda: TokenSubset(), ValueError, "got None and None"),
        (lambda: TokenSubset(keys=KEPT.float()), TypeError, "keys must be .* got torch.float32"),
    ],
)
def test_branches_without_meaning_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("branch", "words"),
    [
        (BlockSparse(block_mask=MASK, block_size=3), "seq_len=12, got 3 blocks of 3 .* needs 4"),
        (BlockSparse(block_mask=MASK.expand(3, 3, 3), block_size=4), r"2 heads, got \(3, 3, 3\)"),
        (TokenSubset(keys=KEPT[:, :5]), r"keys .* \(1, 12, 2\), got \(1, 5, 2\)"),
        (TokenSubset(queries=KEPT[..., :1]), r"queries .* \(1, 12, 2\), got \(1, 12, 1\)"),
        (TokenSubset(queries=KEPT.to("meta")), "on the device of q, got meta and cpu"),
        (BlockSparse(block_mask=MASK.to("meta"), block_size=4), "got meta and cpu"),
    ],
)
def test_branches_that_do_not_fit_the_call_are_refused(branch, words):
    with pytest.raises(ValueError, match=words):
        attend(branch)


def test_what_is_no_branch_is_refused():
    with pytest.raises(TypeError, match="BigBirdBlocks, HashBuckets or TokenSubset, got int"):
        attend(64)


def test_bounds_of_packed_sequences_are_checked_without_a_pattern():
    bounds = torch.tensor([0, 5, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"strictly from 0 to seq_len=12, got \[0, 5, 11\]"):
        attend(HashBuckets(num_buckets=4), cu_seqlens=bounds)


def test_no_pattern_and_no_branch_is_refused():
    q, k, v = torch.randn(3, 1, 12, 2, 4).unbind(0)
    with pytest.raises(TypeError, match="pattern must be a DilatedPattern, got NoneType"):
        lz.dilated_attention(q, k, v, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": torch.zeros(1, 1, 12, 12)}, "do not support bias, got one with 1"),
        ({"xpos_scale_base": 512.0}, "do not support xpos_scale_base"),
        ({"dropout_p": 0.1}, "do not support dropout_p"),
        ({"backend": "triton"}, "backend 'triton'"),
    ],
)
def test_options_that_branches_do_not_serve_are_refused(options, words):
    with pytest.raises(NotImplementedError, match=words):
        attend(HashBuckets(num_buckets=4), **options)


def test_capture_of_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr("longnet_zoo.ops.branched_attention.can_read", lambda x: False)
    with pytest.raises(NotImplementedError, match="part of a CUDA graph, got some"):
        attend(HashBuckets(num_buckets=4, num_rounds=2))


@pytest.mark.parametrize("pattern", [None, lz.DilatedPattern.geometric(4, 8)])
@pytest.mark.parametrize("is_lone", [True, False])
def test_what_is_no_tuple_of_branches_is_refused(pattern, is_lone):
    q, k, v = torch.randn(3, 1, 12, 2, 4).unbind(0)
    branch = HashBuckets(num_buckets=4)
    given = branch if is_lone else iter([branch])
    with pytest.raises(TypeError, match="must be a tuple of branches, got"):
        lz.dilated_attention(q, k, v, pattern, extra_branches=given)


def test_a_negative_scale_is_refused():
    with pytest.raises(NotImplementedError, match=r"need a positive scale, got -0\.5"):
        attend(HashBuckets(num_buckets=4), scale=-0.5)


@pytest.mark.parametrize(
    "branch",
    [
        BlockSparse(block_mask=MASK, block_size=4),
        BigBirdBlocks(block_size=4),
        HashBuckets(num_buckets=4),
    ],
)
def test_pairs_of_no_tokens_are_not_counted(branch):
    with pytest.raises(ValueError, match="seq_len must be at least 1, got -100"):
        branch.attended_pairs(-100, 2)


def test_pairs_of_a_mask_that_does_not_fit_are_not_counted():
    branch = BlockSparse(block_mask=MASK, block_size=4)
    with pytest.raises(ValueError, match="must cover seq_len=13"):
        branch.attended_pairs(13, 2)
    by_head = BlockSparse(block_mask=MASK.expand(3, 3, 3), block_size=4)
    with pytest.raises(ValueError, match="one for each of 2 heads"):
        by_head.attended_pairs(12, 2)


def test_bias_is_refused_beside_a_pattern():
    q, k, v = torch.randn(3, 1, 12, 2, 4).unbind(0)
    pattern = lz.DilatedPattern(segment_lengths=(4,), dilation_rates=(1,))
    branches = (HashBuckets(num_buckets=4),)
    with pytest.raises(NotImplementedError, match="do not support bias"):
        lz.dilated_attention(
            q, k, v, pattern, bias=lambda x: x.expand(2, -1).float(), extra_branches=branches
        )


def test_report_says_which_kernel_runs_tiles():
    q, k, v = torch.randn(3, 1, 12, 2, 4).unbind(0)
    branches = (HashBuckets(num_buckets=4),)
    report = lz.explain_backend(q, k, v, None, extra_branches=branches, return_lse=True)
    assert (report.forward, report.backward) == ("sdpa", "math")
    assert "block" in report.reasons["triton"] or "CUDA" in report.reasons["triton"]


def test_checks_pass_a_call_that_fits():
    branches = (BlockSparse(block_mask=MASK, block_size=4), TokenSubset(keys=KEPT))
    q = torch.randn(1, 12, 2, 4)
    check_extra_branches(q, branches, bias=None, xpos_scale_base=None, dropout_p=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_branches_do_not_depend_on_the_default_dtype(dtype):
    q, k, v = torch.randn(3, 1, 40, 2, 8)
    branches = (HashBuckets(num_buckets=4), BigBirdBlocks(block_size=8))
    expected = lz.dilated_attention(q, k, v, None, extra_branches=branches)
    torch.set_default_dtype(dtype)
    try:
        found = lz.dilated_attention(q, k, v, None, extra_branches=branches)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
