"""The op as a citizen of PyTorch: opcheck, torch.compile, torch.export, fake tensors."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from tests.ops.draws import FLOAT32, Call

CALL = Call(
    segment_lengths=(4, 9),
    dilation_rates=(1, 3),
    seq_len=13,
    batch=2,
    num_heads=4,
    num_kv_heads=2,
)
CALLS = {
    "plain": CALL,
    "causal": dataclasses.replace(CALL, is_causal=True),
    "zero_keys": dataclasses.replace(CALL, padded_keys="zero", head_offset="block"),
    "right_padding": dataclasses.replace(CALL, padding="right"),
    "left_padding": dataclasses.replace(CALL, padding="left"),
    "packed": dataclasses.replace(CALL, batch=1, documents=(4, 1, 8)),
    "dense_bias": dataclasses.replace(CALL, bias="dense"),
    "table": dataclasses.replace(CALL, bias="table", is_causal=True),
    "xpos": dataclasses.replace(CALL, xpos_scale_base=16.0),
    "slices": dataclasses.replace(CALL, layout="packed"),
}


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch.compiler.reset()


def function_of(call: Call):
    """The call as a function of its tensors, returning out and lse."""
    options = call.options()

    def attend(q, k, v, bias=None):
        return dilated_attention(
            q, k, v, call.pattern, bias=call.as_bias(bias), return_lse=True, **options
        )

    return attend


def out_and_grads(function, inputs):
    out, lse = function(*inputs.values())
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    loss = loss + torch.where(lse.isneginf(), 0.0, lse).sum()
    return [out, lse, *torch.autograd.grad(loss, list(inputs.values()))]


@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name):
    """Without a break in the graph. This backend needs no C++ compiler on the machine."""
    function, inputs = function_of(CALLS[name]), CALLS[name].inputs(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = out_and_grads(function, inputs)
    for got, value in zip(out_and_grads(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(got, value, **FLOAT32)


def test_compiled_with_a_dynamic_length_equals_eager():
    compiled = torch.compile(function_of(CALL), fullgraph=True, backend="aot_eager", dynamic=True)
    for seq_len in (13, 8, 3, 30):
        call = dataclasses.replace(CALL, seq_len=seq_len)
        inputs = call.inputs(torch.float32)
        expected = out_and_grads(function_of(call), inputs)
        for got, value in zip(out_and_grads(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(got, value, **FLOAT32)


def test_compiled_dropout_equals_eager():
    inputs = CALL.inputs(torch.float32)

    def function(q, k, v):
        return dilated_attention(q, k, v, CALL.pattern, dropout_p=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for attend in (function, compiled):
        torch.manual_seed(4)
        out = attend(*inputs.values())
        results.append([out, *torch.autograd.grad(out.sum(), list(inputs.values()))])
    for got, value in zip(*results, strict=True):
        torch.testing.assert_close(got, value, **FLOAT32)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager():
    function, inputs = function_of(CALLS["causal"]), CALLS["causal"].inputs(torch.float32)

    def doubled(*tensors):
        out, lse = function(*tensors)
        return out * 2, lse

    compiled = torch.compile(doubled, fullgraph=True)
    expected = out_and_grads(doubled, inputs)
    for got, value in zip(out_and_grads(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(got, value, **FLOAT32)


def test_exported_equals_eager():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return dilated_attention(q, k, v, CALL.pattern, is_causal=True)

    q, k, v = (x.detach() for x in CALL.inputs(torch.float32).values())
    seq_len = torch.export.Dim("seq_len", min=2, max=4096)
    dynamic = {name: {1: seq_len} for name in ("q", "k", "v")}
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=dynamic)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.longnet_zoo.dilated_attention.default in targets
    for length in (13, 5):
        inside = [x[:, :length] for x in (q, k, v)]
        got = program.module()(*inside)
        torch.testing.assert_close(got, Module()(*inside), **FLOAT32)


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_fake_tensors_get_the_shapes_and_dtypes_of_real_ones(dtype, lse_dtype):
    q, k, v = CALL.inputs(dtype).values()
    real = dilated_attention(q, k, v, CALL.pattern, return_lse=True)
    with FakeTensorMode() as mode:
        fakes = (mode.from_tensor(x) for x in (q, k, v))
        fake = dilated_attention(*fakes, CALL.pattern, return_lse=True)
    for a, b, wanted in zip(real, fake, (dtype, lse_dtype), strict=True):
        assert a.dtype == b.dtype == wanted
        assert a.shape == b.shape
        assert a.stride() == b.stride()


# opcheck itself looks at the gradients of clones.
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def op_arguments(call: Call, *, dropout_p: float = 0.0, return_lse: bool = True):
    """The flat arguments of the custom op for a call."""
    inputs, options = call.inputs(torch.float32), call.options()
    bias = inputs.get("bias")
    span = min(call.segment_lengths[-1], call.seq_len)
    is_dense = bias is not None and call.bias.startswith("dense")
    by_distance = None
    if bias is not None and not is_dense:
        table = call.as_bias(bias)(torch.arange(1 - span, span))
        by_distance = table.detach().requires_grad_()
    return (
        *(inputs[name] for name in "qkv"),
        bias if is_dense else None,
        by_distance,
        options["key_padding_mask"],
        options["cu_seqlens"],
        torch.tensor(7) if dropout_p else None,
        list(call.segment_lengths),
        list(call.dilation_rates),
        call.head_offset,
        call.padded_keys,
        0,
        None,
        call.is_causal,
        call.head_dim**-0.5,
        call.xpos_scale_base,
        dropout_p,
        "auto",
        return_lse,
    )


@OPCHECK
@pytest.mark.parametrize("name", ["plain", "right_padding", "packed", "dense_bias", "table"])
def test_the_custom_op_passes_opcheck(name):
    arguments = op_arguments(CALLS[name], return_lse=name != "plain")
    torch.library.opcheck(torch.ops.longnet_zoo.dilated_attention.default, arguments)


@OPCHECK
def test_the_custom_op_with_dropout_passes_opcheck():
    arguments = op_arguments(CALL, dropout_p=0.4)
    torch.library.opcheck(torch.ops.longnet_zoo.dilated_attention.default, arguments)


def test_the_backward_op_passes_opcheck():
    arguments = op_arguments(CALLS["dense_bias"])
    with torch.no_grad():
        out, lse = torch.ops.longnet_zoo.dilated_attention(*arguments)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(
        torch.ops.longnet_zoo.dilated_attention_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), *plain[:3], out, lse, *plain[3:]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_inputs_are_left_as_they_are():
    for call in CALLS.values():
        inputs = call.inputs(torch.float32)
        before = {name: x.detach().clone() for name, x in inputs.items()}
        out_and_grads(function_of(call), inputs)
        assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_a_pattern_can_be_made_inside_a_compiled_function():
    q, k, v = CALL.inputs(torch.float32).values()

    def function(q, k, v):
        pattern = DilatedPattern(segment_lengths=(4, 9), dilation_rates=(1, 3))
        return dilated_attention(q, k, v, pattern)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v), **FLOAT32)
