"""One call that spreads the sequences of a model over processes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from .gradients import GradientAverager
from .layout import Layout
from .styles import Inputs, Method, ParallelStack, ParallelTextLoss

__all__ = ["parallelize"]

ModelT = TypeVar("ModelT", bound=Any)


def parallelize(
    model: ModelT,
    mesh: DeviceMesh,
    *,
    method: Method = "dilated",
    layout: Layout = "contiguous",
    inputs: Inputs = "full",
    loss_mesh: DeviceMesh | None = None,
    average_gradients: bool = True,
) -> ModelT:
    """Spreads the sequences of a model over processes; results stay what they are on one.

    All processes hold all parameters, with equal values, unless FSDP2 shards them afterwards. Each
    computes the same loss, and gradients are averaged over the processes, as in data parallelism.
    Parameters that are unfrozen, replaced or added later are averaged, too. For dropout, seed the
    processes apart once the model is made. Over data and sequences, wrap the model in DDP or FSDP2
    over both dimensions of the mesh, with `average_gradients=False`.

    Args:
        model: Any model of the zoo, or another with a `stack`; it is changed in place.
        mesh: The processes that share a sequence, one dimension: `mesh["sequence"]`.
        method: `"dilated"`, `"ring"` or `"all_to_all"`; see `ParallelAttention`.
        layout: Which process has which tokens; see `ParallelAttention`.
        inputs: `"full"`: every process passes the same whole inputs and gets the whole outputs,
            what the stack computes is shared. `"sharded"`, for text models: each passes its part
            (`shard_sequence`, `shard_text`) and gets the output of that part, so that no process
            needs the whole sequence; `loss` then is that of all tokens.
        loss_mesh: For `inputs="sharded"`: processes over whose tokens `loss` is averaged, data and
            sequence dimensions together; None: those of `mesh`.
        average_gradients: Whether each backward pass averages the gradients over `mesh`. False
            leaves that to DDP or FSDP2.

    Returns:
        The model.

    Raises:
        ValueError: If the model does not fit the method, the mesh or `inputs`; the message names
            what does.

    Example:
        >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "sequence"))
        >>> model = create_model("longnet_lm_base").cuda()
        >>> parallelize(model, mesh["sequence"], inputs="sharded")
        >>> tokens, labels = shard_text(tokens, mesh["sequence"])
        >>> model.loss(tokens, labels).backward()
    """
    _check(model, mesh, inputs, loss_mesh)
    stack = ParallelStack(method, layout=layout, inputs=inputs)
    parallelize_module(model, mesh, {"stack": stack})
    if inputs == "sharded":
        parallelize_module(model, _flat(loss_mesh or mesh), ParallelTextLoss())
    if average_gradients:
        averager = GradientAverager(model, mesh.get_group())
        averager()
        model.stack.register_forward_pre_hook(averager)
    return model


def _check(model: nn.Module, mesh: DeviceMesh, inputs: str, loss_mesh: DeviceMesh | None) -> None:
    """Refuses what cannot be, before anything is changed."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            "mesh must be a DeviceMesh, as torch.distributed.device_mesh.init_device_mesh makes, "
            f"got {type(mesh).__name__}."
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh}. Name the one that shares sequences: "
            "mesh['sequence']."
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"a process spreads its models over processes it is one of, got {mesh} and rank "
            f"{dist.get_rank()}."
        )
    stack = dict(model.named_children()).get("stack")
    if stack is None:
        raise ValueError(
            f"model must have a stack of blocks, got {type(model).__name__}. Wrap a model (DDP, "
            "torch.compile) after it is spread; for other models use parallelize_module with "
            "ParallelAttention."
        )
    if "forward" in vars(stack):
        raise ValueError(
            f"a model is spread once, got a {type(model).__name__} that is. Make a new one."
        )
    if inputs == "sharded" and not hasattr(model, "cross_entropy_op"):
        raise ValueError(ParallelTextLoss.refusal(model))
    if loss_mesh is None:
        return
    if inputs == "full":
        raise ValueError(
            "loss_mesh is for inputs='sharded': with inputs='full' every process has all tokens."
        )
    if not set(mesh.mesh.tolist()) <= set(loss_mesh.mesh.flatten().tolist()):
        raise ValueError(
            f"loss_mesh must hold the processes of mesh, got {loss_mesh} and {mesh}. Pass the mesh "
            "of data and sequence together."
        )


def _flat(mesh: DeviceMesh) -> DeviceMesh:
    return mesh if mesh.ndim == 1 else mesh._flatten()
