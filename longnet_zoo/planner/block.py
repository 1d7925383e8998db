"""What autograd keeps of one block, and what its backward pass makes beside it, in bytes a token.

Read off the layers, tensor by tensor; nothing is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .network import Network

__all__ = ["FLOAT32", "PRECISIONS", "BlockBytes", "Device", "Sizes", "block_bytes"]

Device = Literal["cuda", "cpu"]
FLOAT32 = 4
_STATISTICS = 2 * FLOAT32  # mean and deviation of a LayerNorm


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a number, by what it is.

    Attributes:
        parameter: A parameter, its gradient and its optimizer states.
        residual: The stream of a block's inputs and outputs.
        compute: What matrices are multiplied with, and what attention takes.
    """

    parameter: int
    residual: int
    compute: int

    @property
    def is_mixed(self) -> bool:
        """Whether autocast casts what is multiplied."""
        return self.compute < self.parameter

    @property
    def sum(self) -> int:
        """What is added up: at least float32."""
        return max(self.compute, FLOAT32)


# By the names of Lightning.
PRECISIONS = {
    "32-true": Sizes(parameter=4, residual=4, compute=4),
    "bf16-mixed": Sizes(parameter=4, residual=4, compute=2),
    "bf16-true": Sizes(parameter=2, residual=2, compute=2),
}


@dataclass(frozen=True, kw_only=True)
class BlockBytes:
    """Bytes a token.

    Attributes:
        stream: The block's input, or its output.
        kept_input: What autograd keeps of the input.
        op_result: What the attention op returns: out and log-sum-exp.
        attention: Kept by attention up to the input of the feed-forward network, without `stream`.
        attention_early: Of that, what is free again before the op is differentiated.
        feed_forward: Kept by the feed-forward network.
        feed_gradients: Most of the gradients of its hidden channels at once.
        op_gradient: The gradient of what the op returns.
        op_sums: What the op adds gradients to, and the decayed queries and keys.
        op_last: What it makes of the sums at the end.
        op_call: What one kernel call returns, added up in float32.
        tables: Rotary cosine and sine.
    """

    stream: int
    kept_input: int
    op_result: int
    attention: int
    attention_early: int
    feed_forward: int
    feed_gradients: int
    op_gradient: int
    op_sums: int
    op_last: int
    op_call: int
    tables: int

    @property
    def kept(self) -> int:
        """Bytes that autograd keeps of all this."""
        return self.kept_input + self.attention + self.feed_forward


def block_bytes(network: Network, sizes: Sizes, device: Device) -> BlockBytes:
    """Adds up the tensors of a block."""
    channels, kv = network.embed_dim, network.kv_dim
    stream, compute = channels * sizes.residual, channels * sizes.compute
    op_result = compute + FLOAT32 * network.num_heads
    qkv = channels + 2 * kv
    tables = FLOAT32 * network.head_dim if network.has_rotary else 0
    early = _sum_bytes(network, sizes, device)
    # The norm's output, input of the next layer: autocast keeps its cast instead.
    early += stream if network.is_post_norm and not sizes.is_mixed else 0
    if network.has_inner_norm:
        early += _norm_copy(channels, sizes, device) + compute + _STATISTICS
    attention = early + qkv * sizes.compute + op_result
    attention += _inputs_bytes(network, sizes, num_linears=3)
    if network.has_qk_norm:
        num_heads = network.num_heads + network.num_kv_heads
        size = FLOAT32 if sizes.is_mixed and device == "cuda" else sizes.compute
        attention += (channels + kv) * size + _STATISTICS * num_heads
    attention += 2 * tables  # as complex numbers, of queries and of keys
    has_decay = network.xpos_scale_base is not None and network.pattern.is_nested
    decayed = channels + kv if has_decay else 0
    copies = qkv * sizes.compute if sizes.compute < sizes.sum else 0
    return BlockBytes(
        stream=stream,
        kept_input=0 if network.is_post_norm and sizes.is_mixed else stream,
        op_result=op_result,
        attention=attention,
        attention_early=early,
        feed_forward=_feed_forward(network, sizes, device),
        feed_gradients=_feed_gradients(network, sizes, device),
        op_gradient=compute,
        op_sums=qkv * sizes.sum + decayed * sizes.compute + FLOAT32 * network.num_heads,
        op_last=max(decayed * sizes.sum, copies),
        op_call=3 * channels * sizes.sum,  # for every query head
        tables=tables,
    )


def _feed_forward(network: Network, sizes: Sizes, device: Device) -> int:
    hidden = network.ffn_dim * sizes.compute
    feed = _inputs_bytes(network, sizes, num_linears=2 if network.is_gated else 1)
    feed += (4 if network.is_gated else 2) * hidden  # what each elementwise step reads, and the end
    if network.has_inner_norm:
        # What it reads may be a copy in float32, in place of the tensor itself.
        copy = _norm_copy(network.ffn_dim, sizes, device)
        feed += (copy - hidden if copy else 0) + hidden + _STATISTICS
    if network.activation_dropout:
        feed += _mask_bytes(network.ffn_dim, sizes, device)
    last = _sum_bytes(network, sizes, device)
    # Where no norm reads the last sum, it is the next block's input.
    return feed + (last if network.is_post_norm else last - network.embed_dim * sizes.residual)


def _feed_gradients(network: Network, sizes: Sizes, device: Device) -> int:
    hidden = network.ffn_dim * sizes.compute
    if network.has_inner_norm:
        # The norm's two gradients in float32, less what fc2 read.
        copy = _norm_copy(network.ffn_dim, sizes, device)
        return 2 * copy - hidden if copy else hidden
    return 2 * hidden if network.is_gated else hidden


def _sum_bytes(network: Network, sizes: Sizes, device: Device) -> int:
    """The sum of residual and update, which a norm reads, and what dropout keeps of the update."""
    stream = network.embed_dim * sizes.residual + _STATISTICS
    return stream + (_mask_bytes(network.embed_dim, sizes, device) if network.dropout else 0)


def _inputs_bytes(network: Network, sizes: Sizes, *, num_linears: int) -> int:
    """Input of the linear layers after a norm; autocast casts it for each of them."""
    if sizes.is_mixed:
        return num_linears * network.embed_dim * sizes.compute
    return 0 if network.is_post_norm else network.embed_dim * sizes.compute


def _norm_copy(channels: int, sizes: Sizes, device: Device) -> int:
    """The float32 copy that autocast on a GPU makes of the half input of a norm."""
    return channels * FLOAT32 if sizes.is_mixed and device == "cuda" else 0


def _mask_bytes(channels: int, sizes: Sizes, device: Device) -> int:
    """A GPU keeps which numbers dropout kept as a byte each, a CPU their factors."""
    return channels * (1 if device == "cuda" else sizes.compute)
