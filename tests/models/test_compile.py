"""Whole models under torch.compile: one full graph, the eager result, no graph per length."""

import einops
import pytest
import torch

from longnet_zoo.factory import create_model
from longnet_zoo.ops import positions

from .families import FAMILIES, MASKED_FAMILIES, PATTERN, TEXT, VOCAB_SIZE, Family

EVERY_FAMILY = {**FAMILIES, **MASKED_FAMILIES}
# What these compute is compiled elsewhere: the towers and the loss of "clip_loss" by themselves,
# the others in "multimodal_padded", in the test of lengths that are told, in "encoder_relative"
# and "encoder_packed", and in "slides", whose graph hands the op other options.
ELSEWHERE = ("clip_loss", "multimodal", "decoder", "encoder_loss", "slides_as_published")
COMPILED = [name for name in EVERY_FAMILY if name not in ELSEWHERE]
# Two to learn that the length varies. Then others: within, between and beyond the segments.
FIRST_LENGTHS, LENGTHS = (20, 43), (31, 13, 57, 90)
# These learn it, which takes two graphs. The others are told, and take one.
LEARNING = ("decoder_loss", "slides", "beit3_pair")


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch.compiler.reset()
    # Nor code that older runs left on disk, found there by its graph and not by our operators.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def output_and_grads(model, function, inputs):
    """The output and the gradient of each parameter, of a sum against a random cotangent."""
    output = function(*inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    named = dict(model.named_parameters())
    grads = torch.autograd.grad((output * cotangent).sum(), list(named.values()), allow_unused=True)
    return {"output": output.detach(), **dict(zip(named, grads, strict=True))}


def assert_same(got, expected):
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
            continue
        error, size = (got[name] - value).abs().max(), value.abs().max()
        assert error <= 2e-6 + 2e-5 * size, f"{name}: off by {error} of {size}"


def compiled_function(family: Family, model, **options):
    """The family's call as a function of its inputs, eager and compiled."""

    def function(*inputs):
        return family.call(model, *inputs)

    options = {"backend": "aot_eager", **options}
    return function, torch.compile(function, fullgraph=True, **options)


def draw_marked(family: Family, length: int):
    """Inputs that tell the compiler which sizes vary: those that differ at another length."""
    inputs = family.draw(length)
    for x, other in zip(inputs, family.draw(length + 47), strict=True):
        for dim in range(0 if x is None else x.ndim):
            if x.shape[dim] != other.shape[dim]:
                torch._dynamo.mark_dynamic(x, dim)
    return inputs


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_model_equals_eager_without_a_graph_per_length(name):
    family = EVERY_FAMILY[name]
    model = family.make()
    is_told = name not in LEARNING
    eager, compiled = compiled_function(family, model)
    for length in (*FIRST_LENGTHS[is_told:], *LENGTHS):
        inputs = draw_marked(family, length) if is_told else family.draw(length)
        # From LENGTHS on every compilation is an error.
        with torch._dynamo.config.patch(error_on_recompile=length in LENGTHS):
            got = output_and_grads(model, compiled, inputs)
        assert_same(got, output_and_grads(model, eager, inputs))


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_einops_gets_plain_tensors_only(name, monkeypatch):
    """It remembers the types it has seen, and a new one makes compiled code compile anew."""
    types = {}
    monkeypatch.setattr(einops._backends, "_type2backend", types)
    family = EVERY_FAMILY[name]
    family.call(family.make(), *family.draw(43))
    assert set(types) <= {torch.Tensor}


def test_one_graph_serves_all_lengths_if_told_that_they_vary(monkeypatch):
    # Rotary tables of long sequences are made in chunks.
    monkeypatch.setattr(positions, "_POSITIONS_PER_CHUNK", 16)
    family = FAMILIES["decoder"]
    model = family.make()
    eager, compiled = compiled_function(family, model, dynamic=True)
    for length in LENGTHS:
        with torch._dynamo.config.patch(error_on_recompile=length != LENGTHS[0]):
            inputs = family.draw(length)
            got = compiled(*inputs)
        assert_same({"output": got}, {"output": eager(*inputs)})


def test_recomputed_blocks_compile():
    family = FAMILIES["decoder_loss"]
    model = family.make()
    model.set_grad_checkpointing()
    eager, compiled = compiled_function(family, model)
    inputs = family.draw(43)
    got, expected = (output_and_grads(model, f, inputs) for f in (compiled, eager))
    assert_same(got, expected)


def test_dropout_compiles():
    """With torch's own random numbers, so that eager and compiled draw the same."""
    options = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.1}
    model = create_model("longnet_lm_tiny", **TEXT, **PATTERN, **options)
    tokens = torch.randint(VOCAB_SIZE, (2, 43))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, model, model):
        torch.manual_seed(len(results) // 2)
        results.append(output_and_grads(model, function, (tokens,)))
    assert_same(results[0], results[1])
    assert not torch.equal(results[1]["output"], results[2]["output"])


def test_exported_model_takes_every_length():
    family = FAMILIES["decoder"]
    model = family.make().eval()
    dynamic = {"tokens": {1: torch.export.Dim("seq_len", min=2, max=4096)}}
    program = torch.export.export(model, family.draw(43), dynamic_shapes=dynamic)
    for length in LENGTHS:
        inputs = family.draw(length)
        assert_same({"output": program.module()(*inputs)}, {"output": model(*inputs)})


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager():
    family = FAMILIES["decoder_loss"]
    model = family.make()
    # It sets guards of its own for tiny sizes, such as sums of few rows.
    eager, compiled = compiled_function(family, model, backend="inductor", dynamic=True)
    for length in (43, 90):
        inputs = family.draw(length)
        got = output_and_grads(model, compiled, inputs)
        assert_same(got, output_and_grads(model, eager, inputs))
