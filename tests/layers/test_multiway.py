"""Multiway modules: each token by the weights of its modality, nothing kept between calls."""

import dataclasses
import re
from functools import partial

import pytest
import torch
from torch import nn

from longnet_zoo.layers import (
    DilatedAttention,
    FeedForward,
    Multiway,
    Route,
    TransformerBlock,
    TransformerStack,
    make_multiway,
    run_routed,
)
from longnet_zoo.ops.pattern import DilatedPattern

DENSE = DilatedPattern(segment_lengths=(1000,), dilation_rates=(1,))
DILATED = DilatedPattern(segment_lengths=(5, 11), dilation_rates=(1, 3))
SPLIT = Route.split(7, 4)


def make_linear(num_modalities=2):
    return Multiway(partial(nn.Linear, 6, 10), num_modalities=num_modalities)


def make_stack(**options):
    sizes = {"embed_dim": 24, "num_layers": 2, "num_heads": 4, "ffn_dim": 31, "pattern": DENSE}
    return TransformerStack(**(sizes | {"position": None, "num_modalities": 2} | options))


def expert_of(state_dict, expert):
    """The weights of one modality, under the names of a plain module."""
    mark = f".experts.{expert}."
    return {key.replace(mark, "."): x for key, x in state_dict.items() if mark in key}


def make_experts_equal(module):
    for child in module.modules():
        if isinstance(child, Multiway):
            for expert in child.experts[1:]:
                expert.load_state_dict(child.experts[0].state_dict())


def test_split_gives_each_part_to_its_expert():
    linear = make_linear(3)
    x = torch.randn(2, 9, 6)
    for lengths in [(2, 3, 4), (0, 9, 0), (4, 0, 5), (0, 0, 9)]:
        parts = zip(linear.experts, x.split(lengths, dim=1), strict=True)
        expected = torch.cat([expert(part) for expert, part in parts], dim=1)
        torch.testing.assert_close(linear(x, Route.split(*lengths)), expected)


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_tokens_in_any_order_go_to_their_experts(num_modalities):
    linear = make_linear(num_modalities)
    x = torch.randn(3, 7, 6)
    modalities = torch.randint(num_modalities, (3, 7))
    out = linear(x, Route.per_token(modalities, num_modalities=num_modalities))
    for row in range(3):
        for place in range(7):
            expected = linear.experts[modalities[row, place]](x[row, place])
            torch.testing.assert_close(out[row, place], expected)


def test_both_routes_agree():
    linear = make_linear()
    x = torch.randn(2, 11, 6)
    modalities = (torch.arange(11) >= 7).long().expand(2, -1)
    per_token = Route.per_token(modalities, num_modalities=2)
    torch.testing.assert_close(linear(x, per_token), linear(x, SPLIT))


def test_inner_dimensions_are_kept():
    norm = Multiway(partial(nn.LayerNorm, 5), num_modalities=2)
    nn.init.normal_(norm.experts[1].weight)
    x = torch.randn(2, 11, 3, 5)
    expected = torch.cat([norm.experts[0](x[:, :7]), norm.experts[1](x[:, 7:])], dim=1)
    assert torch.equal(norm(x, SPLIT), expected)
    per_token = Route.per_token(
        (torch.arange(11) >= 7).long()[None].expand(2, -1), num_modalities=2
    )
    assert torch.equal(norm(x, per_token), expected)


def test_a_call_leaves_no_trace():
    """A call for one modality must not change what the next call does, whatever its route."""
    stack = make_stack()
    x = torch.randn(2, 11, 24)
    routes = [Route.split(11, 0), Route.split(0, 11), SPLIT]
    before = {key: value.clone() for key, value in stack.state_dict().items()}
    first = [stack(x, route=route) for route in routes]
    for route, expected in zip(reversed(routes), reversed(first), strict=True):
        assert torch.equal(stack(x, route=route), expected)
    assert stack.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in stack.state_dict().items())
    with pytest.raises(ValueError, match="route must be for 2 modalities, got None"):
        stack(x)
    with pytest.raises(AttributeError):
        SPLIT.lengths = (4, 7)


def test_only_experts_with_tokens_get_gradients():
    linear = make_linear(3)
    linear(torch.randn(2, 5, 6), Route.split(3, 0, 2)).sum().backward()
    has_gradient = [expert.weight.grad is not None for expert in linear.experts]
    assert has_gradient == [True, False, True]


def test_in_a_part_of_a_sequence_every_expert_gets_a_gradient():
    # Other processes wait for it.
    layer = Multiway(lambda: nn.Linear(4, 4), num_modalities=2)
    route = dataclasses.replace(Route.split(3, 0), is_part=True)
    layer(torch.randn(2, 3, 4), route).sum().backward()
    assert layer.experts[0].weight.grad.ne(0).any()
    assert layer.experts[1].weight.grad.eq(0).all()


def test_gradients_of_mixed_tokens():
    linear = make_linear().double()
    modalities = torch.randint(2, (2, 5))
    route = Route.per_token(modalities, num_modalities=2)
    x, cotangent = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 10).double()
    (linear(x, route) * cotangent).sum().backward()
    for expert in range(2):
        chosen = modalities == expert
        expected = cotangent[chosen].T @ x[chosen]
        torch.testing.assert_close(linear.experts[expert].weight.grad, expected)


def test_one_modality_makes_the_plain_module():
    linear = make_multiway(partial(nn.Linear, 6, 10), 1)
    assert type(linear) is nn.Linear
    x = torch.randn(2, 5, 6)
    assert torch.equal(run_routed(linear, x, None), linear(x))
    multiway = make_multiway(partial(nn.Linear, 6, 10), 2)
    assert torch.equal(run_routed(multiway, x, Route.split(2, 3)), multiway(x, Route.split(2, 3)))
    assert not any("experts" in key for key in make_stack(num_modalities=1).state_dict())


@pytest.mark.parametrize("norm", ["sub_ln", "pre_ln", "deepnorm"])
@pytest.mark.parametrize("expert", [0, 1])
def test_stack_with_tokens_of_one_modality_is_the_plain_stack(norm, expert):
    options = {"norm": norm, "qk_norm": True, "activation": "swiglu", "pattern": DILATED}
    stack, plain = make_stack(**options), make_stack(**options, num_modalities=1)
    plain.load_state_dict(expert_of(stack.state_dict(), expert))
    x = torch.randn(2, 11, 24)
    route = Route.split(*((11, 0) if expert == 0 else (0, 11)))
    assert torch.equal(stack(x, route=route), plain(x))


@pytest.mark.parametrize("position", ["xpos", "alibi", None])
def test_stack_with_equal_experts_is_the_plain_stack(position):
    options = {"position": position, "pattern": DILATED, "num_kv_heads": 2}
    stack, plain = make_stack(**options), make_stack(**options, num_modalities=1)
    make_experts_equal(stack)
    weights = expert_of(stack.state_dict(), 0)
    plain.load_state_dict(weights)
    x, mask = torch.randn(2, 11, 24), torch.arange(11) >= torch.tensor([[11], [8]])
    torch.testing.assert_close(
        stack(x, route=SPLIT, key_padding_mask=mask), plain(x, key_padding_mask=mask)
    )


def test_order_of_modalities_does_not_matter_without_positions():
    stack = make_stack()
    x, order = torch.randn(2, 11, 24), torch.randperm(11)
    modalities = (order >= 7).long().expand(2, -1)
    route = Route.per_token(modalities, num_modalities=2)
    torch.testing.assert_close(
        stack(x[:, order], route=route), stack(x, route=SPLIT)[:, order], atol=1e-5, rtol=1e-5
    )


def test_every_layer_of_a_block_is_multiway():
    feed = partial(FeedForward, embed_dim=24, ffn_dim=31)
    block = TransformerBlock(
        attention=DilatedAttention(embed_dim=24, num_heads=4, pattern=DENSE, num_modalities=2),
        feed_forward=make_multiway(feed, 2),
        embed_dim=24,
        num_modalities=2,
    )
    assert all(".experts." in key for key in block.state_dict())
    x = torch.randn(2, 11, 24)
    out = block(x, route=SPLIT)
    # Text weights change texts directly, and images through attention alone.
    with torch.no_grad():
        block.feed_forward.experts[1].fc2.bias += 1.0
    changed = block(x, route=SPLIT)
    assert torch.equal(changed[:, :7], out[:, :7])
    torch.testing.assert_close(changed[:, 7:], out[:, 7:] + 1.0)
    with torch.no_grad():
        block.attention.v_proj.experts[1].weight *= 2.0
    assert (block(x, route=SPLIT) - changed)[:, :7].abs().max() > 1e-3


def test_blocks_look_at_the_inner_norm_of_an_expert():
    attention = DilatedAttention(
        embed_dim=24, num_heads=4, pattern=DENSE, num_modalities=2, sub_ln=False
    )
    feed = partial(FeedForward, embed_dim=24, ffn_dim=31, sub_ln=True)
    with pytest.raises(
        ValueError, match="needs feed_forward with sub_ln=False, got one with sub_l"
    ):
        TransformerBlock(
            attention=attention,
            feed_forward=make_multiway(feed, 2),
            embed_dim=24,
            norm="pre_ln",
            num_modalities=2,
        )


@pytest.mark.parametrize("name", ["v_proj", "out_proj", "fc1", "fc2"])
def test_all_experts_have_the_gain_of_the_depth(name):
    stack = make_stack(embed_dim=96, num_layers=4, ffn_dim=128)
    gain = torch.tensor(8.0).log().sqrt()
    weights = [x for key, x in stack.named_parameters() if f".{name}." in key and x.ndim == 2]
    assert len(weights) == 8
    for weight in weights:
        xavier = (2.0 / sum(weight.shape)) ** 0.5
        torch.testing.assert_close(weight.std(), gain * xavier, rtol=0.05, atol=0)


def test_checkpointing_and_compilation_give_the_eager_gradients():
    stack = make_stack(pattern=DILATED, num_layers=1)
    x = torch.randn(2, 11, 24)
    cotangent = torch.randn(2, 11, 24)

    def gradients(run):
        stack.zero_grad()
        out = run(x, route=Route.split(7, 4))
        (out * cotangent).sum().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in stack.parameters())]

    expected = gradients(stack)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), expected, atol=1e-5, rtol=1e-5)
    stack.set_grad_checkpointing()
    torch.testing.assert_close(gradients(stack), expected)


def test_compiles_with_a_route_per_token():
    linear = make_linear()
    x, modalities = torch.randn(2, 5, 6), torch.randint(2, (2, 5))
    route = Route.per_token(modalities, num_modalities=2)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, route), linear(x, route))


def test_bad_routes_are_refused():
    linear, x = make_linear(), torch.randn(2, 5, 6)
    with pytest.raises(TypeError, match=r"integers, one per modality, got \(2\.5, 2\.5\)"):
        Route.split(2.5, 2.5)
    for lengths in [(), (3, -1), (0, 0)]:
        with pytest.raises(
            ValueError,
            match=f"one of them above 0, got {re.escape(str(lengths))}",
        ):
            Route.split(*lengths)
    with pytest.raises(ValueError, match=r"add up to seq_len=5, got \(3, 3\)"):
        linear(x, Route.split(3, 3))
    with pytest.raises(ValueError, match="route must be for 2 modalities, got one for 3"):
        linear(x, Route.split(3, 1, 1))
    with pytest.raises(ValueError, match=r"\(batch, seq_len\)=\(2, 5\), got one for \(5, 2\)"):
        linear(x, Route.per_token(torch.zeros(5, 2).long(), num_modalities=2))
    with pytest.raises(TypeError, match=r"modalities must be int64, got torch\.bool"):
        Route.per_token(torch.zeros(2, 5).bool(), num_modalities=2)
    with pytest.raises(ValueError, match=r"modalities must be \(batch, seq_len\), got \(5,\)"):
        Route.per_token(torch.zeros(5).long(), num_modalities=2)
    with pytest.raises(ValueError, match="num_modalities=2, got values from 0 to 2"):
        Route.per_token(torch.tensor([[0, 2]]), num_modalities=2)
    with pytest.raises(ValueError, match="num_modalities must be at least 2, got 1"):
        make_linear(1)
    with pytest.raises(ValueError, match="of 2 modalities for a stack with num_modalities=1"):
        make_stack(num_modalities=1)(torch.randn(2, 11, 24), route=SPLIT)
