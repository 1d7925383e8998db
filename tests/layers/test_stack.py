"""TransformerStack: what the layers share, checkpointing, hidden states."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from longnet_zoo.layers import AlibiBias, MemorySaving, RelativeBias, TransformerStack
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import rotary_tables

PATTERN = DilatedPattern(segment_lengths=(5, 11), dilation_rates=(1, 3))
POSITIONS = ["xpos", "rotary", "alibi", "relative", None]
NORMS = ["sub_ln", "pre_ln", "deepnorm"]


def make(**options):
    sizes = {"embed_dim": 24, "num_layers": 3, "num_heads": 4, "ffn_dim": 31, "pattern": PATTERN}
    return TransformerStack(**(sizes | options))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("position", POSITIONS)
def test_equals_its_blocks_in_a_row(position, norm):
    stack = make(position=position, norm=norm)
    x = torch.randn(2, 17, 24)
    tables = rotary_tables(torch.arange(17), 6) if position in ("xpos", "rotary") else None
    bias = stack.position_bias
    assert isinstance(
        bias, {"alibi": AlibiBias, "relative": RelativeBias}.get(position, type(None))
    )
    expected = x
    states = [x]
    for block in stack.blocks:
        expected = block(expected, rotary=tables, position_bias=bias)
        states.append(expected)
    if norm != "deepnorm":
        expected = functional.layer_norm(expected, (24,), eps=1e-5)
    out, hidden_states = stack(x, return_hidden_states=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert len(hidden_states) == 4
    for ours, theirs in zip(hidden_states, states, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(stack(x), out)


def test_states_and_blocks_can_be_chosen():
    stack = make()
    x = torch.randn(2, 11, 24)
    _, states = stack(x, return_hidden_states=True)
    _, some = stack(x, return_hidden_states=(0, 2))
    torch.testing.assert_close(some, [states[0], states[2]])
    out, first = stack(x, num_blocks=1, return_hidden_states=[1])
    torch.testing.assert_close(first, [states[1]])
    torch.testing.assert_close(out, stack.norm(states[1]))


def test_deepnorm_scales_the_residual():
    assert {block.residual_scale for block in make(norm="deepnorm").blocks} == {6**0.25}
    assert make(norm="deepnorm").norm is None
    assert {block.residual_scale for block in make(norm="sub_ln").blocks} == {1.0}


def test_rotary_tables_are_made_once(monkeypatch):
    stack = make()
    calls = []
    for rotary in [stack.rotary, *(block.attention.rotary for block in stack.blocks)]:
        rotary.register_forward_hook(lambda module, *_: calls.append(module))
    stack(torch.randn(1, 7, 24))
    assert calls == [stack.rotary]


def test_positions_are_absolute():
    stack = make(position="rotary")
    x = torch.randn(1, 9, 24)
    torch.testing.assert_close(
        stack(x, positions=torch.arange(9) + 10**6), stack(x), atol=1e-5, rtol=1e-5
    )
    assert (stack(x, positions=torch.arange(9) * 5) - stack(x)).abs().max() > 1e-4


def test_one_relative_table_for_all_layers():
    stack = make(position="relative", relative_buckets=8, relative_max_distance=20)
    names = [name for name in stack.state_dict() if "embedding" in name]
    assert names == ["position_bias.embedding.weight"]
    assert stack.position_bias.embedding.weight.shape == (8, 4)
    out = stack(torch.randn(1, 17, 24))
    (out * torch.randn_like(out)).sum().backward()
    assert stack.position_bias.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("position", POSITIONS)
def test_padded_batch_equals_one_by_one(position):
    stack = make(position=position)
    x, lengths = torch.randn(3, 19, 24), (19, 8, 1)
    mask = torch.arange(19) >= torch.tensor(lengths)[:, None]
    out = stack(x, key_padding_mask=mask)
    assert out.isfinite().all()
    for row, length in enumerate(lengths):
        alone = stack(x[row : row + 1, :length])
        torch.testing.assert_close(out[row, :length], alone[0], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_row_equals_one_by_one(position):
    stack = make(position=position, is_causal=True)
    x, lengths = torch.randn(1, 28, 24), (19, 8, 1)
    out = stack(x, cu_seqlens=torch.tensor([0, 19, 27, 28], dtype=torch.int32))
    expected = torch.cat([stack(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def gradients(stack, x):
    torch.manual_seed(3)
    out = stack(x)
    grads = torch.autograd.grad(out, list(stack.parameters()), torch.ones_like(out) + out.detach())
    return out, grads


@pytest.mark.parametrize("position", ["xpos", "relative"])
def test_checkpointing_gives_equal_gradients_with_dropout(position):
    """Recomputation must draw the same dropout masks."""
    stack = make(
        position=position,
        dropout=0.2,
        attention_dropout=0.3,
        activation_dropout=0.2,
        drop_path=0.3,
    )
    x = torch.randn(4, 17, 24)
    out, grads = gradients(stack, x)
    stack.set_grad_checkpointing()
    out_checkpointed, grads_checkpointed = gradients(stack, x)
    assert torch.equal(out, out_checkpointed)
    for grad, expected in zip(grads_checkpointed, grads, strict=True):
        torch.testing.assert_close(grad, expected)
    assert any(grad.abs().max() > 0 for grad in grads)


def test_checkpointing_recomputes_blocks_and_can_be_turned_off():
    stack = make()
    calls = []
    for block in stack.blocks:
        # Recomputation may stop before a module returns, so beginnings are counted.
        block.feed_forward.register_forward_pre_hook(lambda module, *_: calls.append(module))
    for enable, expected in ((True, 6), (False, 3)):
        stack.set_grad_checkpointing(enable)
        calls.clear()
        stack(torch.randn(1, 7, 24)).sum().backward()
        assert len(calls) == expected
    stack.set_grad_checkpointing()
    calls.clear()
    with torch.no_grad():
        stack(torch.randn(1, 7, 24))
    assert len(calls) == 3


def test_drop_path_grows_linearly():
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in make(drop_path=0.4).blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    assert not hasattr(make(num_layers=1, drop_path=0.4).blocks[0].drop_path, "drop_prob")


def test_a_call_may_bring_an_op_for_each_block():
    stack, x = make(), torch.randn(2, 9, 24)
    order = []

    def op(number, q, *args, **options):
        order.append(number)
        return dilated_attention(q, *args, **options) * number

    ops = [partial(op, number) for number in range(1, 1 + len(stack.blocks))]
    first = stack(x, attention_ops=ops)
    assert order == [1, 2, 3]
    assert not torch.allclose(first, stack(x))
    plain = stack(x, attention_ops=[dilated_attention] * 3)
    assert torch.equal(plain, stack(x))
    # It gets whole sequences, since it may attend to a prefix.
    lengths = []
    stack = make(pattern=DilatedPattern(segment_lengths=(2, 4), dilation_rates=(1, 2)))
    stack.set_memory_saving(MemorySaving(chunk_size=2))
    spies = [lambda q, *args, **options: lengths.append(q.shape[1]) or q] * 3
    stack(x, attention_ops=spies)
    assert lengths == [9, 9, 9]


def test_options_reach_the_layers():
    stack = make(
        num_kv_heads=2,
        is_causal=True,
        rotary_base=500.0,
        xpos_scale_base=700.0,
        activation="swiglu",
        qk_norm=True,
        bias=False,
        dropout=0.1,
        attention_dropout=0.2,
        activation_dropout=0.3,
        eps=1e-3,
        backend="math",
    )
    for block in stack.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        assert attention.num_kv_heads == 2
        assert attention.is_causal
        assert attention.xpos_scale_base == 700.0
        assert attention.rotary.base == stack.rotary.base == 500.0
        assert attention.q_norm is not None
        assert attention.backend == "math"
        assert attention.dropout == 0.2
        assert feed_forward.gate is not None
        assert feed_forward.dropout.p == 0.3
        assert block.dropout.p == 0.1
        norms = (block.attention_norm, block.ffn_norm, attention.inner_norm, attention.q_norm)
        assert {norm.eps for norm in (*norms, feed_forward.inner_norm, stack.norm)} == {1e-3}
    assert not [name for name in stack.state_dict() if name.endswith("proj.bias")]


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_is_finite(norm):
    stack = make(norm=norm, is_causal=True, qk_norm=True)
    x = torch.randn(2, 17, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = stack(x)
    assert (out - stack(x)).abs().max() < 0.2
    (out * torch.randn_like(out)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters())


def test_state_dict_round_trip():
    stack, other = make(position="relative"), make(position="relative")
    other.load_state_dict(stack.state_dict())
    x = torch.randn(1, 17, 24)
    assert torch.equal(stack(x), other(x))


@pytest.mark.parametrize("position", POSITIONS)
def test_can_be_built_without_memory(position):
    stack = make()
    with torch.device("meta"):
        empty = make(position=position, drop_path=0.1)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    if position == "xpos":
        empty.load_state_dict(stack.state_dict(), assign=True)
        x = torch.randn(1, 9, 24)
        assert torch.equal(empty.eval()(x), stack(x))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        make(num_layers=0)
    with pytest.raises(ValueError, match=r"position must be None or one of .* got 'learned'"):
        make(position="learned")
    with pytest.raises(ValueError, match=r"got 'post'"):
        make(norm="post")
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\), got 1\.0"):
        make(drop_path=1.0)
    with pytest.raises(ValueError, match=r"positions of \(9,\) for a stack without"):
        make(position="alibi")(torch.randn(1, 9, 24), positions=torch.arange(9))
    with pytest.raises(ValueError, match=r"embed_dim=24, got \(1, 9, 23\)"):
        make()(torch.randn(1, 9, 23))
