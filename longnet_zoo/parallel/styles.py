"""Styles for `torch.distributed.tensor.parallel.parallelize_module`: attention, stack, text model.

Layers are found by their attributes: `attention_op` of an attention layer, `blocks` of a stack,
`cross_entropy_op` of a text model. No model changes for this.

Shape legend: b batch, n tokens of the whole sequence, c tokens of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.weak import WeakTensorKeyDictionary

from longnet_zoo.ops.pattern import DilatedPattern

from .agreement import check_alike
from .all_to_all import all_to_all_attention, check_num_heads
from .collectives import group_named
from .dilated import parallel_dilated_attention
from .gradients import with_mean_gradient
from .layout import (
    Layout,
    check_layout,
    gather_sequence,
    part_length,
    positions_of,
    shard_padding_mask,
    shard_sequence,
)
from .loss import ParallelCrossEntropy
from .ring import ring_attention
from .sequences import check_whole_bounds, find_sequences

__all__ = ["Inputs", "Method", "ParallelAttention", "ParallelStack", "ParallelTextLoss"]

Method = Literal["dilated", "ring", "all_to_all"]
Inputs = Literal["full", "sharded"]


class ParallelAttention(ParallelStyle):
    """Lets attention layers work on parts of sequences.

    For modules that have an `attention_op`, themselves or inside. They then take the part of this
    process, with the rotary tables of its positions, and give the output of that part.

    Args:
        method: `"dilated"`: sparsified keys travel once for each layer; any pattern and number of
            processes. `"ring"`: all keys pass round; for dense patterns. `"all_to_all"`: heads are
            exchanged for tokens; any pattern, but the number of processes must divide the heads.
        layout: Which process has which tokens; all but `"contiguous"` are for `"ring"`.

    Raises:
        ValueError: If `method` or `layout` is unknown or they do not go together; when it is
            applied, if a module does not fit the method.

    Example:
        >>> plan = {"stack.blocks.*.attention": ParallelAttention(method="ring")}
        >>> parallelize_module(model, mesh["sequence"], plan)
    """

    def __init__(self, method: Method = "dilated", *, layout: Layout = "contiguous") -> None:
        super().__init__()
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
        check_layout(layout)
        if layout != "contiguous" and method != "ring":
            raise ValueError(
                f"layout={layout!r} is for method='ring', got method={method!r}. "
                "Use layout='contiguous'."
            )
        self.method, self.layout = method, layout
        # What is in the masks that a stack handed to its layers, which all have the same.
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layers: list[Any] = [x for x in module.modules() if hasattr(x, "attention_op")]
        if not layers:
            raise ValueError(
                "ParallelAttention is for modules with an attention_op, got "
                f"{type(module).__name__} without any."
            )
        op = self._op(device_mesh)
        for layer in layers:
            if getattr(layer, "extra_branches", ()):
                raise NotImplementedError(
                    "processes that share a sequence know dilated branches only, got a layer with "
                    f"extra_branches={layer.extra_branches}. Run the model whole."
                )
            if self.method == "all_to_all":
                check_num_heads(layer.num_heads, device_mesh.size())
            if self.method == "ring":
                check_dense(layer.pattern)
        for layer in layers:
            layer.attention_op = op
        return module

    def _op(self, mesh: DeviceMesh) -> Callable[..., Any]:
        if self.method == "ring":
            return partial(_ring_attention, mesh=mesh, layout=self.layout)
        if self.method == "all_to_all":
            return partial(all_to_all_attention, mesh=mesh)
        return partial(_dilated_attention, mesh=mesh, found_in=self._found)


class ParallelStack(ParallelAttention):
    """Lets a stack of blocks work on parts of sequences.

    Args:
        method: As for `ParallelAttention`.
        layout: As for `ParallelAttention`.
        inputs: `"full"`: every process passes the same whole sequences and gets the whole output;
            the parts are made inside. `"sharded"`: each passes its part, equally long everywhere,
            and gets the output of that part.

    Raises:
        ValueError: As for `ParallelAttention`, or if `inputs` is unknown.
    """

    def __init__(
        self,
        method: Method = "dilated",
        *,
        layout: Layout = "contiguous",
        inputs: Inputs = "full",
    ) -> None:
        super().__init__(method, layout=layout)
        if inputs not in get_args(Inputs):
            raise ValueError(f"inputs must be one of {get_args(Inputs)}, got {inputs!r}.")
        self.inputs = inputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        for block in module.modules():
            drop_path = getattr(block, "drop_path", None)
            if isinstance(drop_path, nn.Module) and not isinstance(drop_path, nn.Identity):
                block.drop_path = SharedDraw(drop_path, device_mesh.get_group())
        forward = self._full if self.inputs == "full" else self._sharded
        module.forward = partial(forward, module, module.forward, device_mesh)
        return module

    # Masks are read here, and what a compiler makes of the pieces need not send in one order on all
    # processes. What it calls is compiled.
    @torch.compiler.disable(recursive=False)
    def _full(
        self,
        stack: nn.Module,
        forward: Callable[..., Any],
        mesh: DeviceMesh,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        route: Any = None,
        **options: Any,
    ) -> Any:
        """Cuts whole sequences, (b, n, e), and joins the output of all processes."""
        group, (batch, seq_len, _) = mesh.get_group(), x.shape
        check_alike(x, group, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens)
        shard = partial(shard_sequence, mesh=mesh, layout=self.layout)
        if cu_seqlens is None:
            mask = shard_padding_mask(key_padding_mask, seq_len, batch, mesh, self.layout)
        else:
            mask = None  # boundaries say by themselves what is padding
            check_whole_bounds(cu_seqlens, batch, seq_len, key_padding_mask)
        if positions is not None:
            positions = shard(positions, dim=0)
        outs = self._run(
            stack,
            forward,
            mesh,
            # What comes before is the same on all processes, and so must its gradient be.
            shard(with_mean_gradient(x, group)),
            positions=positions,
            key_padding_mask=mask,
            cu_seqlens=cu_seqlens,
            route=None if route is None else self._route(route, mesh, seq_len),
            **options,
        )
        gather = partial(gather_sequence, mesh=mesh, layout=self.layout, seq_len=seq_len)
        if isinstance(outs, tuple):
            out, hidden_states = outs
            return gather(out), [gather(state) for state in hidden_states]
        return gather(outs)

    def _sharded(
        self,
        stack: nn.Module,
        forward: Callable[..., Any],
        mesh: DeviceMesh,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Runs the stack on a part, (b, c, e)."""
        masks = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        check_alike(x, mesh.get_group(), **masks)
        return self._run(stack, forward, mesh, x, **masks, **options)

    def _run(
        self,
        stack: nn.Module,
        forward: Callable[..., Any],
        mesh: DeviceMesh,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Runs the stack on a part, (b, c, e), at its positions in the whole sequence."""
        if key_padding_mask is not None and self.method == "dilated":
            found = find_sequences(x, key_padding_mask, cu_seqlens, mesh.get_group())
            self._found[key_padding_mask] = found
        if positions is None and stack.rotary is not None:
            positions = positions_of(
                mesh.get_local_rank(), mesh.size(), x.shape[1], self.layout, device=x.device
            )
        return forward(
            x,
            positions=positions,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            **options,
        )

    def _route(self, route: Any, mesh: DeviceMesh, seq_len: int) -> Any:
        if self.layout != "contiguous":
            raise NotImplementedError(
                f"a multiway stack needs layout='contiguous', got {self.layout!r}."
            )
        sizes = [part_length(seq_len, mesh.size())] * mesh.size()
        return replace(route.parts(sizes)[mesh.get_local_rank()], is_part=True)


class SharedDraw(nn.Module):
    """Gives all processes what the first one draws: all parts of a sample skip a block, or none.

    Args:
        draw: Makes random numbers of the size of its input.
        group: The processes.
    """

    def __init__(self, draw: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.draw = draw
        self._group_name = group.group_name

    def forward(self, x: Tensor) -> Tensor:
        """Draws and shares; there is nothing to share in evaluation."""
        drawn = self.draw(x)
        if self.training:
            dist.broadcast(drawn, group=group_named(self._group_name), group_src=0)
        return drawn


class ParallelTextLoss(ParallelStyle):
    """Lets a text model make its loss of all tokens that the processes of a mesh have."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not hasattr(module, "cross_entropy_op"):
            raise ValueError(self.refusal(module))
        model: Any = module
        model.cross_entropy_op = ParallelCrossEntropy(device_mesh.get_group())
        return module

    @staticmethod
    def refusal(module: nn.Module) -> str:
        """Says why a module cannot have it."""
        return (
            "inputs='sharded' is for models that take tokens one by one outside of attention, "
            f"those with a cross_entropy_op, got {type(module).__name__}. Use inputs='full'."
        )


def check_dense(pattern: DilatedPattern, seq_len: int = 1) -> None:
    """Refuses patterns in which a query does not see every key; raises ValueError."""
    if pattern.dilation_rates != (1,) or pattern.segment_lengths[0] < seq_len:
        got = f" and a sequence of {seq_len} tokens" if seq_len > 1 else ""
        raise ValueError(
            "method='ring' is full attention: it needs one branch of rate 1 whose segment holds "
            f"the whole sequence, got {pattern}{got}. Use method='dilated', or give the model "
            "segment_lengths=(1073741824,) and dilation_rates=(1,)."
        )


def _dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    mesh: DeviceMesh,
    found_in: WeakTensorKeyDictionary,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    # A stack has compared what processes pass, and looked into its mask for all layers.
    if key_padding_mask is None:
        found = find_sequences(q, None, cu_seqlens, mesh.get_group())
    else:
        found = found_in.get(key_padding_mask)
    return parallel_dilated_attention(
        q,
        k,
        v,
        pattern,
        mesh,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        found=found,
        **options,
    )


def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    mesh: DeviceMesh,
    **options: Any,
) -> Any:
    check_dense(pattern, q.shape[1] * mesh.size())
    return ring_attention(q, k, v, mesh, **options)
