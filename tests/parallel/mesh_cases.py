"""Cases of test_parallelize.py on 2 x 2 ranks: two batches, each sequence over two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from longnet_zoo.parallel import parallelize, shard_padding_mask, shard_sequence
from tests.models.families import VOCAB_SIZE
from tests.parallel.model_cases import SEQ_LEN, TOLERANCE, assert_gradients
from tests.parallel.models import text_model


def setting():
    """The model, the batch of this rank's row of the mesh, loss and gradients of all batches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    torch.manual_seed(0)
    model = text_model()
    tokens, labels = torch.randint(VOCAB_SIZE, (2, 2, SEQ_LEN)).unbind()
    # Rows with different numbers of labels: a mean of means would be another number.
    labels = labels.masked_fill(torch.rand(labels.shape) < torch.tensor([[0.1], [0.7]]), -100)
    loss = model.loss(tokens, labels)
    grads = torch.autograd.grad(loss, tuple(model.parameters()))
    row = mesh["data"].get_local_rank()
    return mesh, model, tokens[row : row + 1], labels[row : row + 1], loss, grads


def parts(mesh, tokens, labels):
    return (
        shard_sequence(tokens, mesh["sequence"]),
        shard_sequence(labels, mesh["sequence"], pad_value=-100),
        shard_padding_mask(None, SEQ_LEN, 1, mesh["sequence"]),
    )


class Loss(torch.nn.Module):
    """The loss as `forward`, which DDP wants."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, labels, mask):
        return self.model.loss(tokens, labels, key_padding_mask=mask)


def ddp():
    mesh, model, tokens, labels, expected, grads = setting()
    parallelize(model, mesh["sequence"], inputs="sharded", loss_mesh=mesh, average_gradients=False)
    wrapped = DistributedDataParallel(Loss(model))  # kept, for its hooks go with it
    loss = wrapped(*parts(mesh, tokens, labels))
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    assert_gradients(model, [p.grad for p in model.parameters()], grads)


def ddp_over_data_only():
    """Hooks average over the sequence, DDP over the data."""
    mesh, model, tokens, labels, _, grads = setting()
    parallelize(model, mesh["sequence"], inputs="sharded", loss_mesh=mesh)
    wrapped = DistributedDataParallel(Loss(model), process_group=mesh["data"].get_group())
    loss = wrapped(*parts(mesh, tokens, labels))
    loss.backward()
    assert_gradients(model, [p.grad for p in model.parameters()], grads)


def fsdp():
    """FSDP2 over both dimensions: what it averages is the gradient of all tokens."""
    mesh, model, tokens, labels, expected, grads = setting()
    parallelize(model, mesh["sequence"], inputs="sharded", loss_mesh=mesh)
    flat = mesh._flatten()
    for block in model.stack.blocks:
        fully_shard(block, mesh=flat)
    fully_shard(model, mesh=flat)
    torch.distributed.fsdp.register_fsdp_forward_method(model, "loss")
    tokens, labels, mask = parts(mesh, tokens, labels)
    loss = model.loss(tokens, labels, key_padding_mask=mask)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    loss.backward()
    assert_gradients(model, [p.grad.full_tensor() for p in model.parameters()], grads)


def whole_inputs_fsdp():
    mesh, model, tokens, labels, _, _ = setting()
    expected = model.loss(tokens, labels, reduction="sum")
    total = expected.detach().clone()
    grads = torch.autograd.grad(expected, tuple(model.parameters()))
    for grad in grads:
        dist.all_reduce(grad)
        grad /= 4  # the mean over data, of which each batch is there twice
    parallelize(model, mesh["sequence"], average_gradients=False)
    flat = mesh._flatten()
    for block in model.stack.blocks:
        fully_shard(block, mesh=flat)
    fully_shard(model, mesh=flat)
    torch.distributed.fsdp.register_fsdp_forward_method(model, "loss")
    loss = model.loss(tokens, labels, reduction="sum")
    torch.testing.assert_close(loss, total, **TOLERANCE)
    loss.backward()
    assert_gradients(model, [p.grad.full_tensor() for p in model.parameters()], grads)


def fsdp_over_data_only():
    """Nobody would average over the sequence: refused at the first forward pass."""
    mesh, model, tokens, labels, _, _ = setting()
    parallelize(model, mesh["sequence"], inputs="sharded", loss_mesh=mesh)
    for block in model.stack.blocks:
        fully_shard(block, mesh=mesh["data"])
    tokens, labels, mask = parts(mesh, tokens, labels)
    with pytest.raises(ValueError, match=r"FSDP2 must average gradients over .* without"):
        model.loss(tokens, labels, key_padding_mask=mask)


def loss_mesh_without_the_sequence():
    mesh, model, *_ = setting()
    with pytest.raises(ValueError, match="loss_mesh must hold the processes of mesh"):
        parallelize(model, mesh["sequence"], inputs="sharded", loss_mesh=mesh["data"])


CASES = {
    "fsdp_over_data_only": fsdp_over_data_only,
    "loss_mesh_without_the_sequence": loss_mesh_without_the_sequence,
    "ddp": ddp,
    "ddp_over_data_only": ddp_over_data_only,
    "fsdp": fsdp,
    "whole_inputs_fsdp": whole_inputs_fsdp,
}
