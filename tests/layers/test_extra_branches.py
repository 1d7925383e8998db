"""Branches beside those of the pattern in layers and stacks."""

import pytest
import torch

import longnet_zoo as lz
from longnet_zoo.layers import DilatedAttention, MemorySaving, TransformerStack
from longnet_zoo.ops.branches import BigBirdBlocks, HashBuckets, TokenSubset
from longnet_zoo.ops.dilated_attention import dilated_attention

PATTERN = lz.DilatedPattern(segment_lengths=(8, 16), dilation_rates=(1, 2))
BRANCHES = (HashBuckets(num_buckets=4), BigBirdBlocks(block_size=4, num_random=1))


def make_layer(**options) -> DilatedAttention:
    defaults = {"embed_dim": 24, "num_heads": 3, "pattern": PATTERN, "position": "rotary"}
    return DilatedAttention(**{**defaults, "extra_branches": BRANCHES, **options})


def make_stack(**options) -> TransformerStack:
    sizes = {"embed_dim": 24, "num_layers": 2, "num_heads": 3, "ffn_dim": 48, "pattern": PATTERN}
    defaults = {**sizes, "position": "rotary", "is_causal": True, "extra_branches": BRANCHES}
    return TransformerStack(**{**defaults, **options})


def test_layer_hands_its_branches_to_the_op(monkeypatch):
    calls = []

    def spy(*tensors, **options):
        calls.append(options)
        return dilated_attention(*tensors, **options)

    layer, plain = make_layer(), make_layer(extra_branches=())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 50, 24)
    out, plain_out = layer(x), plain(x)
    assert not torch.allclose(out, plain_out)
    for module in (layer, plain):
        monkeypatch.setattr("longnet_zoo.layers.attention.dilated_attention", spy)
        module.attention_op = spy
        module(x)
    assert calls[0]["extra_branches"] == BRANCHES
    # An op that knows of no branches still serves layers without any.
    assert "extra_branches" not in calls[1]


def test_layer_equals_its_parts():
    layer = make_layer(position=None, sub_ln=False)
    x = torch.randn(2, 50, 24)
    q, k, v = (
        project(x).unflatten(-1, (3, 8)) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    expected = dilated_attention(q, k, v, PATTERN, extra_branches=BRANCHES)
    torch.testing.assert_close(layer(x), layer.out_proj(expected.flatten(2)))


def test_every_parameter_gets_a_gradient():
    stack = make_stack()
    stack(torch.randn(1, 40, 24)).square().sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in stack.parameters())


def test_saving_memory_does_not_cut_what_branches_join():
    stack = make_stack(drop_path=0.0)
    x = torch.randn(1, 64, 24)
    expected = stack(x)
    stack.set_memory_saving(MemorySaving(chunk_size=16))
    torch.testing.assert_close(stack(x), expected)


def test_layer_lists_its_branches():
    assert "extra_branches=(HashBuckets(num_buckets=4" in repr(make_layer())
    assert "extra_branches" not in repr(make_layer(extra_branches=()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position": "xpos"}, "got position='xpos' and dropout=0.0"),
        ({"position": "alibi"}, "got position='alibi'"),
        ({"dropout": 0.1}, "got position='rotary' and dropout=0.1"),
    ],
)
def test_options_that_branches_do_not_serve_are_refused(options, words):
    with pytest.raises(NotImplementedError, match=words):
        make_layer(**options)


def test_stack_with_a_shared_bias_is_refused():
    stack = make_stack(position="alibi")
    with pytest.raises(NotImplementedError, match="do not support bias, got one with 2"):
        stack(torch.randn(1, 20, 24))


def test_branch_with_tensors_is_refused():
    subset = TokenSubset(keys=torch.ones(1, 9, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"HashBuckets, .* got TokenSubset"):
        make_layer(extra_branches=(subset,))


@pytest.mark.parametrize("place", ["attribute", "call"])
def test_another_op_is_refused(place):
    def other(*tensors, **options):
        raise AssertionError

    layer = make_layer()
    if place == "attribute":
        layer.attention_op = other
    given = other if place == "call" else None
    with pytest.raises(NotImplementedError, match=r"extra_branches run by .* got .*other.* with 2"):
        layer(torch.randn(1, 20, 24), attention_op=given)
