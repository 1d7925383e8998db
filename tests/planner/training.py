"""A training step of a sequence that ranks share, for comparison with its plan."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longnet_zoo.factory import create_model
from longnet_zoo.parallel import parallelize, shard_text

DENSE = {"segment_lengths": (2**30,), "dilation_rates": (1,)}


def make_step(config, method, *, average_gradients=False):
    """Forward and backward pass of a model on this rank's part, as the config says."""
    mesh = init_device_mesh("cpu", (config.gpus,))
    model = create_model(config.model, **config.options)
    if config.precision == "bf16-true":
        model.bfloat16()
    layout = config.layout if method == "ring" else "contiguous"
    parallelize(
        model,
        mesh,
        method=method,
        inputs="sharded",
        layout=layout,
        average_gradients=average_gradients,
    )
    model.set_memory_saving(config.memory_saving)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens, labels = shard_text(torch.randint(100, (1, config.seq_len + 1)), mesh, layout=layout)

    def step():
        model.loss(tokens, labels).backward()

    return model, step


@contextmanager
def uncounted_messages():
    """Lets collectives send from memory that the profiler does not see.

    Tensors that a thread of gloo frees are never seen to be freed.
    """
    send = dist.all_to_all_single

    def send_uncounted(output, input, *args, async_op=False, **kwargs):
        sent, received = (_uncounted(x.numel(), x.dtype).view(x.shape) for x in (input, output))
        work = send(received, sent.copy_(input), *args, async_op=True, **kwargs)
        work.wait()
        output.copy_(received)
        return work if async_op else None

    with mock.patch.object(dist, "all_to_all_single", send_uncounted):
        yield


def _uncounted(size, dtype):
    memory = np.empty((size + 1) * dtype.itemsize, np.uint8)  # never none, which has no strides
    return torch.from_numpy(memory).view(dtype)[:size]
