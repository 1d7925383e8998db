"""One call that spreads the sequences of a model over processes."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from .collectives import average_gradients as average
from .layout import Layout
from .styles import Inputs, Method, ParallelStack, ParallelTextLoss

__all__ = ["parallelize"]

ModelT = TypeVar("ModelT", bound=nn.Module)


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
    Over data and sequences, wrap the model in DDP or FSDP2 over both dimensions of the mesh, with
    `average_gradients=False`.

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
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh}. Name the one that shares sequences: "
            "mesh['sequence']."
        )
    if not isinstance(getattr(model, "stack", None), nn.Module):
        raise ValueError(
            f"model must have a stack of blocks, got {type(model).__name__}. For others use "
            "parallelize_module with ParallelAttention."
        )
    if "forward" in vars(model.stack):
        raise ValueError(
            f"a model is spread once, got a {type(model).__name__} that is. Make a new one."
        )
    if loss_mesh is not None and inputs == "full":
        raise ValueError(
            "loss_mesh is for inputs='sharded': with inputs='full' every process has all tokens."
        )
    styles: dict[str, ParallelStyle] = {
        "stack": ParallelStack(method, layout=layout, inputs=inputs)
    }
    if inputs == "sharded":
        parallelize_module(model, _flat(loss_mesh or mesh), ParallelTextLoss())
    parallelize_module(model, mesh, styles)
    if average_gradients:
        for parameter in model.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                average(parameter, mesh.get_group())
    return model


def _flat(mesh: DeviceMesh) -> DeviceMesh:
    return mesh if mesh.ndim == 1 else mesh._flatten()
