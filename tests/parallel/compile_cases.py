"""Cases of test_parallelize.py under torch.compile, which takes far longer than the others."""

from __future__ import annotations

import torch
import torch.distributed as dist

from longnet_zoo.parallel import parallelize, shard_sequence
from tests.models.families import VOCAB_SIZE
from tests.parallel.model_cases import SEQ_LEN, TOLERANCE, assert_gradients, averaged, gradients
from tests.parallel.models import mesh_of, text_model


def compiled_parts():
    """A compiled loss over parts: one graph, with its collectives and gradients."""
    torch.manual_seed(0)
    model = text_model()
    tokens = torch.randint(VOCAB_SIZE, (1, 8 * dist.get_world_size()))
    expected = model.loss(tokens, tokens, reduction="sum")
    expected_grads = torch.autograd.grad(expected, tuple(model.parameters()))
    parallelize(model, mesh_of(), inputs="sharded")
    loss_of = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    part = shard_sequence(tokens, mesh_of())
    loss = loss_of(part, part, reduction="sum")
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    assert_gradients(model, [p.grad for p in model.parameters()], expected_grads)


def compiled_whole_inputs():
    """With padding, which is read between graphs."""
    torch.manual_seed(0)
    model = text_model()
    tokens = torch.randint(VOCAB_SIZE, (1, SEQ_LEN))
    expected = model(tokens)
    expected_grads = gradients(model, expected)
    parallelize(model, mesh_of())
    out = torch.compile(model, backend="aot_eager")(tokens)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert_gradients(model, averaged(model, out), expected_grads)


CASES = {case.__name__: case for case in (compiled_parts, compiled_whole_inputs)}
