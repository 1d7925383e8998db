"""Saving memory changes neither results nor gradients, computes once again, and saves memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import peak_extra_mib
from longnet_zoo.layers import MemorySaving, Route, TransformerBlock, TransformerStack, memory
from longnet_zoo.ops.pattern import DilatedPattern

PATTERN = DilatedPattern(segment_lengths=(4, 12), dilation_rates=(1, 3))
SEQ_LEN = 53
ATTENTION = "longnet_zoo.dilated_attention.default"
SAVINGS = [
    MemorySaving(chunk_size=None),
    MemorySaving(chunk_size=14),
    MemorySaving(chunk_size=10**6),
    MemorySaving(chunk_size=50, keep_attention=True),
    MemorySaving(chunk_size=25, offload=True),
    MemorySaving(chunk_size=None, keep_attention=True, offload=True),
]


def make(**options):
    sizes = {"embed_dim": 24, "num_layers": 2, "num_heads": 4, "ffn_dim": 31, "pattern": PATTERN}
    return TransformerStack(**(sizes | options))


def run(stack, x, **inputs):
    """Output and gradients of the input and of every parameter, by their names."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    out = stack(x, **inputs)
    torch.manual_seed(4)
    leaves = {"x": x, **dict(stack.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_saving_changes_nothing(stack, x, saving, *, tolerance=1e-5, **inputs):
    expected = run(stack, x, **inputs)
    stack.set_memory_saving(saving)
    found = run(stack, x, **inputs)
    for name, value in expected.items():
        atol = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name], value, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def padding(*lengths):
    return torch.arange(SEQ_LEN) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("saving", SAVINGS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"position": "xpos", "is_causal": True},
        {"norm": "pre_ln", "position": "alibi", "activation": "swiglu", "num_kv_heads": 2},
        {"norm": "deepnorm", "position": "relative", "qk_norm": True},
        {"norm": "sub_ln", "position": "rotary", "activation": "swiglu", "bias": False},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_plain_stack(options, saving):
    assert_saving_changes_nothing(make(**options), torch.randn(2, SEQ_LEN, 24), saving)


@pytest.mark.parametrize("saving", SAVINGS, ids=str)
def test_masks_packing_and_routes_are_kept(saving):
    x = torch.randn(2, SEQ_LEN, 24)
    hidden = torch.rand(2, SEQ_LEN) < 0.3
    for mask in (padding(SEQ_LEN, 17), padding(30, 1), hidden):
        assert_saving_changes_nothing(
            make(position="relative"), x, saving, key_padding_mask=mask, tolerance=2e-5
        )
    cu_seqlens = torch.tensor([0, 5, 30, 31, SEQ_LEN], dtype=torch.int32)
    assert_saving_changes_nothing(make(is_causal=True), x[:1], saving, cu_seqlens=cu_seqlens)
    modalities = torch.randint(2, (2, SEQ_LEN))
    for route in (Route.split(17, 36), Route.per_token(modalities, num_modalities=2)):
        stack = make(num_modalities=2, norm="deepnorm")
        assert_saving_changes_nothing(stack, x, saving, route=route)


@pytest.mark.parametrize("saving", SAVINGS, ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        DilatedPattern(segment_lengths=(4, 10), dilation_rates=(1, 3)),
        DilatedPattern(segment_lengths=(4, 12), dilation_rates=(1, 3), padded_keys="zero"),
        DilatedPattern(segment_lengths=(6, 12), dilation_rates=(2, 5), head_offset="block"),
    ],
    ids=["not nested", "zero keys", "rows without a branch"],
)
def test_patterns_that_cannot_be_cut_are_not(pattern, saving):
    x = torch.randn(2, SEQ_LEN, 24)
    assert_saving_changes_nothing(make(pattern=pattern), x, saving)
    assert_saving_changes_nothing(
        make(pattern=pattern), x, saving, key_padding_mask=padding(SEQ_LEN, 17)
    )


def test_an_op_over_several_processes_gets_the_whole_sequence():
    stack, lengths = make(), []
    for block in stack.blocks:
        op = block.attention.attention_op

        def elsewhere(q, *args, op=op, **options):
            lengths.append(q.shape[1])
            return op(q, *args, **options)

        block.attention.attention_op = elsewhere
    stack.set_memory_saving(MemorySaving(chunk_size=12))
    stack(torch.randn(1, SEQ_LEN, 24))
    assert lengths == [SEQ_LEN] * 2


@pytest.mark.parametrize("saving", SAVINGS, ids=str)
def test_dropout_gradients_belong_to_the_output(saving):
    """Second runs must draw as the first ones did: the slope of the output shows it."""
    rates = {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "drop_path": 0.4}
    stack = make(**rates).double()
    stack.set_memory_saving(saving)
    x, cotangent = torch.randn(2, 1, SEQ_LEN, 24, dtype=torch.float64)
    direction = torch.randn_like(x)

    def output(step):
        torch.manual_seed(3)
        return (stack(x + step * direction) * cotangent).sum()

    with torch.no_grad():
        slope = (output(1e-5) - output(-1e-5)) / 2e-5
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(output(step), step)
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=0)


class Constant(nn.Module):
    """Returns the same value everywhere, whatever else it is called with."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, **options):
        return 0.0 * x + self.value


def test_dropout_draws_every_chunk_anew_and_drop_path_every_sample_once():
    x = torch.zeros(64, 40, 8)
    parts = {"attention": Constant(0.0), "feed_forward": Constant(1.0)}
    block = TransformerBlock(**parts, embed_dim=8, norm="pre_ln", dropout=0.5)
    block.memory_saving = MemorySaving(chunk_size=64 * 10)
    out = block(x)
    assert abs((out == 0.0).float().mean() - 0.5) < 0.02
    assert not torch.equal(out[:, :10], out[:, 10:20])
    block = TransformerBlock(**parts, embed_dim=8, norm="pre_ln", drop_path=0.5)
    block.memory_saving = MemorySaving(chunk_size=64 * 10)
    out = block(x)
    assert (out == out[:, :1, :1]).all()
    assert set(out.unique().tolist()) == {0.0, 2.0}


class Work(TorchDispatchMode):
    """Counts the rows that each op works on."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name == "aten.addmm.default":
            name = f"linear to {args[2].shape[1]}"
            self.rows[name] = self.rows.get(name, 0) + args[1].shape[0]
        elif name == ATTENTION:
            self.rows[name] = self.rows.get(name, 0) + args[0].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("saving", "attention", "projections", "hidden"),
    [
        (None, 1, 4, 1),
        (MemorySaving(chunk_size=None), 2, 8, 2),
        (MemorySaving(chunk_size=7), 2, 8, 2),
        (MemorySaving(chunk_size=7, keep_attention=True), 1, 8, 2),
    ],
    ids=str,
)
def test_nothing_is_computed_more_than_once_again(saving, attention, projections, hidden):
    stack = make(num_layers=1)
    stack.set_memory_saving(saving)
    with Work() as work:
        stack(torch.randn(1, SEQ_LEN, 24)).sum().backward()
    # The last linear layer has its inputs back before it would run.
    assert work.rows == {
        ATTENTION: attention * SEQ_LEN,
        "linear to 24": (projections + 1) * SEQ_LEN,
        "linear to 31": hidden * SEQ_LEN,
    }


@pytest.mark.parametrize("saving", [SAVINGS[1], SAVINGS[2]], ids=str)
def test_without_gradients_chunks_run_once(saving):
    stack, x = make(), torch.randn(2, SEQ_LEN, 24)
    expected = stack(x)
    stack.set_memory_saving(saving)
    with torch.no_grad(), Work() as work:
        torch.testing.assert_close(stack(x), expected)
    assert work.rows["linear to 31"] == 2 * 2 * SEQ_LEN


def test_chunks_have_the_size_asked_for():
    stack, sizes = make(num_layers=1), []
    stack.blocks[0].feed_forward.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[:2].numel())
    )
    lengths = []
    stack.blocks[0].attention.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    stack.set_memory_saving(MemorySaving(chunk_size=26))
    with torch.no_grad():
        stack(torch.randn(2, SEQ_LEN, 24))
    assert lengths == [24, 24, 5]  # whole segments of 12 tokens, 13 or more of each sequence
    assert sizes == [26, 22, 26, 22, 10]


def peak_mib(saving, *, ffn_dim=256, seq_len=512):
    pattern = DilatedPattern(segment_lengths=(128, 512), dilation_rates=(1, 4))
    stack = make(embed_dim=64, ffn_dim=ffn_dim, num_layers=8, pattern=pattern, is_causal=True)
    stack.set_memory_saving(saving)
    for parameter in stack.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, cotangent = torch.randn(2, 1, seq_len, 64)
    return peak_extra_mib(lambda: stack(x).backward(cotangent))


def test_peak_memory_does_not_depend_on_the_hidden_width():
    plain, saved = peak_mib(None), peak_mib(MemorySaving(chunk_size=32))
    assert saved < 0.2 * plain
    assert peak_mib(MemorySaving(chunk_size=32), ffn_dim=512) < 1.1 * saved
    # Otherwise it does.
    assert peak_mib(None, ffn_dim=512) > 1.4 * plain
    assert peak_mib(MemorySaving(chunk_size=None), ffn_dim=512) > 1.2 * peak_mib(SAVINGS[0])


def test_attention_over_many_segments_takes_the_memory_of_few():
    long = 8 * 512
    grown = peak_mib(MemorySaving(chunk_size=512), seq_len=long) / long
    assert grown < 0.75 * peak_mib(MemorySaving(chunk_size=512)) / 512


def test_only_inputs_of_blocks_are_kept_and_offloaded(monkeypatch):
    moved = []

    def save_on_cpu(pin_memory):
        assert not pin_memory
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: moved.append(tuple(x.shape)) or x, lambda x: x
        )

    monkeypatch.setattr(memory, "save_on_cpu", save_on_cpu)
    stack = make(num_layers=3)
    stack.set_memory_saving(MemorySaving(chunk_size=7, offload=True))
    stack(torch.randn(1, 12, 24)).sum().backward()
    assert [shape for shape in moved if shape != (0,)] == [(1, 12, 24)] * 3


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("norm", ["sub_ln", "pre_ln", "deepnorm"])
def test_autocast_gives_the_plain_gradients(norm, keep_attention):
    stack, x = make(norm=norm, drop_path=0.3), torch.randn(2, SEQ_LEN, 24)
    saving = MemorySaving(chunk_size=14, keep_attention=keep_attention)
    with torch.autocast("cpu", torch.bfloat16):
        assert_saving_changes_nothing(stack, x, saving, tolerance=2e-2)


def test_backward_twice_and_a_change_in_between():
    stack, x = make(), torch.randn(1, SEQ_LEN, 24, requires_grad=True)
    stack.set_memory_saving(MemorySaving(chunk_size=14))
    out = stack(x).sum()
    stack.set_memory_saving(None)
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(stack(x).sum(), x)[0])


@pytest.mark.parametrize("keep_attention", [False, True])
def test_compiles_whole(keep_attention):
    stack, x = make(is_causal=True, drop_path=0.4).eval(), torch.randn(2, SEQ_LEN, 24)
    expected = run(stack, x)
    stack.set_memory_saving(MemorySaving(chunk_size=None, keep_attention=keep_attention))
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    found = run(compiled, x)
    for name, value in expected.items():
        key = name if name in ("x", "out") else f"_orig_mod.{name}"
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"chunk_size": 14}, {"chunk_size": None, "offload": True}])
def test_what_cannot_be_compiled_is_refused(options):
    stack, x = make(num_layers=1), torch.randn(2, SEQ_LEN, 24)
    stack.set_memory_saving(MemorySaving(**options))
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    message = f"chunk_size={options['chunk_size']} and offload={options.get('offload', False)}"
    with pytest.raises(Exception, match=message):
        compiled(x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stack(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_parts_save_memory_as_usual():
    stack, x = make(num_layers=1, is_causal=True), torch.randn(2, SEQ_LEN, 24)
    expected = run(stack, x)
    for block in stack.blocks:
        block.attention.compile(fullgraph=True, backend="aot_eager")
        block.feed_forward.compile(fullgraph=True, backend="aot_eager")
    stack.set_memory_saving(MemorySaving(chunk_size=14))
    for name, value in run(stack, x).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "at least 1 token, got 0"),
        ({"chunk_size": 2.5}, TypeError, r"integer or None, got 2\.5"),
        ({"chunk_size": True}, TypeError, "integer or None, got True"),
        ({"keep_attention": 1}, TypeError, "keep_attention must be True or False, got 1"),
        ({"offload": "cpu"}, TypeError, "offload must be True or False, got 'cpu'"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MemorySaving(**options)


def test_stack_takes_options_only():
    stack = make()
    with pytest.raises(TypeError, match="MemorySaving or None, got True"):
        stack.set_memory_saving(True)
    stack.set_memory_saving(MemorySaving(chunk_size=5))
    assert {block.memory_saving for block in stack.blocks} == {MemorySaving(chunk_size=5)}
    stack.set_grad_checkpointing()
    assert {block.memory_saving for block in stack.blocks} == {MemorySaving(chunk_size=None)}
    stack.set_grad_checkpointing(False)
    assert {block.memory_saving for block in stack.blocks} == {None}
