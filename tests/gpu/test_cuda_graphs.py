"""Models in CUDA graphs: captured, replayed with other inputs, equal to eager."""

import pytest
import torch

from tests.models.families import FAMILIES, MASKED_FAMILIES

pytestmark = pytest.mark.gpu

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def on_gpu(inputs):
    return [None if x is None else x.cuda() for x in inputs]


def captured(function):
    """Runs a function without arguments a few times, then captures it: the graph and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


def refill(inputs, others):
    for x, other in zip(inputs, others, strict=True):
        if x is not None:
            x.copy_(other)


def with_reversed_mask(x):
    return x.flip(1) if x is not None and x.dtype == torch.bool else x


@pytest.mark.parametrize("name", [*FAMILIES, "decoder_padded"])
def test_forward_is_replayed_with_other_inputs(name):
    family = {**FAMILIES, **MASKED_FAMILIES}[name]
    model = family.make().cuda().eval()
    inputs, others = on_gpu(family.draw(43)), on_gpu(family.draw(43))
    with torch.no_grad():
        first = family.call(model, *inputs)
        expected = family.call(model, *others)
        for _ in range(2):  # right padding is read before a capture, other masks never
            family.call(model, *map(with_reversed_mask, inputs))
        graph, output = captured(lambda: family.call(model, *inputs))
        refill(inputs, others)
        graph.replay()
    torch.testing.assert_close(output, expected, **CLOSE)
    assert not torch.allclose(output, first, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step_is_replayed_with_other_inputs(name):
    family = FAMILIES[name]
    model = family.make().cuda()
    inputs, others = on_gpu(family.draw(43)), on_gpu(family.draw(43))
    parameters = [x for x in model.parameters() if x.requires_grad]

    def gradients(inputs):
        loss = family.call(model, *inputs).square().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    first, expected = gradients(inputs), gradients(others)
    graph, found = captured(lambda: gradients(inputs))
    refill(inputs, others)
    graph.replay()
    for x, value in zip(found, expected, strict=True):
        assert (x is None) == (value is None)
        if value is not None:
            error, size = (x - value).abs().max(), value.abs().max()
            assert error <= 1e-6 + 1e-4 * size
    pairs = zip(found, first, strict=True)
    assert any(x is not None and not torch.allclose(x, y, **CLOSE) for x, y in pairs)


def test_packed_sequences_are_refused_while_a_graph_is_captured():
    family = MASKED_FAMILIES["encoder_packed"]
    model, inputs = family.make().cuda().eval(), on_gpu(family.draw(43))
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"got \d+ packed sequences"):
        captured(lambda: family.call(model, *inputs))


def test_reduce_overhead_uses_graphs_and_equals_eager():
    family = FAMILIES["decoder_loss"]
    model = family.make().cuda()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()

    def loss(tokens, labels):
        return family.call(model, tokens, labels)

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    weight = next(model.stack.parameters())
    for _ in range(4):  # twice to warm up and record, then replays
        inputs = on_gpu(family.draw(43))
        torch.compiler.cudagraph_mark_step_begin()
        (found,) = torch.autograd.grad(compiled(*inputs), [weight])
        found = found.clone()
        (expected,) = torch.autograd.grad(loss(*inputs), [weight])
        torch.testing.assert_close(found, expected, **CLOSE)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
