"""Memory of the activations of a training step: the largest sum over its phases.

The phases are the loss and then, for the last block while those before it still wait, its
feed-forward network, attention, and what joins the parts they were cut into.
"""

from __future__ import annotations

from dataclasses import dataclass

from longnet_zoo.layers import MemorySaving

from .block import FLOAT32, BlockBytes, Device, Sizes, block_bytes
from .logits import Call, whole_calls
from .network import Network

__all__ = ["ActivationMemory", "Part", "activation_memory"]

# What `linear_cross_entropy` gives to the logits of a chunk, and `joint_softmax` to a kernel call.
_LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
_CALL_ROWS = {"cpu": 2**13, "cuda": 2**18}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank holds of a sequence, and how it computes.

    Attributes:
        rows: Tokens of this rank.
        whole_rows: Tokens of the whole sequence, where inputs and outputs of the stack are whole
            on every rank; 0 where they are not.
        sizes: Bytes of numbers.
        saving: How training saves memory.
        is_split: Whether attention sees the other ranks' tokens, so that no span is independent.
        gathered: Bytes that attention keeps of what it received, in one layer.
        kept_with_op: Those of them that every layer keeps if it keeps what attention returns.
        exchanged: Bytes beside them while one layer is differentiated.
        call_rows: Rows of the largest kernel call of attention; None: those of `joint_softmax`.
        calls: Kernel calls that would make logits of a bias; None: those of a whole sequence.
        device: "cuda" or "cpu".
    """

    rows: int
    whole_rows: int = 0
    sizes: Sizes
    saving: MemorySaving | None
    is_split: bool = False
    gathered: int = 0
    kept_with_op: int = 0
    exchanged: int = 0
    call_rows: int | None = None
    calls: tuple[Call, ...] | None = None
    device: Device = "cuda"


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Bytes of activations on one rank.

    Attributes:
        kept: What waits from the forward pass for the backward pass, on the GPU.
        peak: The most that is held at once, `kept` included.
        offloaded: What waits in the memory of the CPU.
    """

    kept: int
    peak: int
    offloaded: int


def activation_memory(network: Network, part: Part) -> ActivationMemory:
    """Adds up the activations of one rank in one training step."""
    block, sizes, saving = block_bytes(network, part.sizes, part.device), part.sizes, part.saving
    keeps_op = saving is not None and saving.keep_attention
    # Beside the tokens: keys of other ranks, and the weights that autocast cast.
    beside = part.gathered - (part.kept_with_op if keeps_op else 0)
    beside += network.block_params * sizes.compute if sizes.is_mixed else 0
    offloaded = 0
    if saving is None:
        before_last = (network.num_layers - 1) * (part.rows * block.kept + beside)
        before_last += part.rows * block.kept_input
        kept = before_last + part.rows * (block.kept - block.kept_input) + beside
    else:
        per_block = block.stream + (block.op_result if keeps_op else 0)
        per_layer = part.rows * per_block + (part.kept_with_op if keeps_op else 0)
        waiting = network.num_layers * per_layer
        offloaded = waiting if saving.offload else 0
        kept = waiting - offloaded + part.rows * block.tables
        before_last = kept
    span, chunk = _span_and_chunk(network, part)
    logits = _logits_bytes(network, part, span)
    feed, *others = _block_phases(
        block, part, span=span, chunk=chunk, keeps_op=keeps_op, logits=logits
    )
    # The gradient of a head that is the embedding waits for the one of the embedding.
    tied = network.head_rows * network.embed_dim * sizes.parameter if network.has_tied_head else 0
    feed_weights, weights = _weight_gradients(network, sizes, part.rows, span=span, chunk=chunk)
    peak = max(
        kept + part.rows * 2 * block.stream + _loss_bytes(network, part),
        before_last + beside + max(feed + feed_weights, max(others) + weights) + tied,
        before_last + 2 * tied,
    )
    whole = 2 * part.whole_rows * block.stream
    return ActivationMemory(kept=kept + whole, peak=peak + whole, offloaded=offloaded)


def _span_and_chunk(network: Network, part: Part) -> tuple[int, int]:
    """Tokens whose attention is differentiated at once, and whose hidden channels exist at once."""
    saving, pattern, rows = part.saving, network.pattern, part.rows
    if saving is None or saving.chunk_size is None:
        return rows, rows
    span = rows
    if not part.is_split and pattern.is_nested and pattern.padded_keys == "ignore":
        segment = pattern.segment_lengths[-1]
        span = min(rows, segment * -(-saving.chunk_size // segment))
    return span, min(span, saving.chunk_size)


def _weight_gradients(
    network: Network, sizes: Sizes, rows: int, *, span: int, chunk: int
) -> tuple[int, int]:
    """Bytes of gradients of a block's matrices at once: in its feed-forward part, and elsewhere."""
    largest = network.largest_weight
    one = largest * (sizes.parameter + sizes.compute * sizes.is_mixed)
    # Those of spans, or of chunks, are added up until the last one; and the new one is there.
    if span < rows:
        summed = max(one, (network.block_params + largest) * sizes.compute)
        return summed, summed
    num_matrices = 3 if network.is_gated else 2
    summed = max(one, (num_matrices + 1) * largest * sizes.compute)
    return (summed if chunk < span else one), one


def _logits_bytes(network: Network, part: Part, span: int) -> int:
    """Bytes of one kernel call that makes logits of a bias; a GPU's Triton kernel makes none."""
    calls = part.calls
    if calls is None:
        calls = tuple(whole_calls(network, span)) if part.device == "cpu" else ()
    if not network.has_bias:
        return 0
    sizes = (call.peak_bytes(network.head_dim, part.sizes.compute) for call in calls)
    return max(sizes, default=0)


def _block_phases(
    block: BlockBytes, part: Part, *, span: int, chunk: int, keeps_op: bool, logits: int
) -> list[int]:
    """Bytes of the phases of a block's backward pass, without what is kept before."""
    stream, rows = block.stream, part.rows
    attention = block.attention - (block.op_result if keeps_op else 0)
    # The gradient of the output, and those of the spans until all are there to be joined.
    around = rows * stream + (rows * stream if span < rows else 0)
    chunks = span * stream if chunk < span else 0
    feed = span * attention + chunks + chunk * (block.feed_forward + block.feed_gradients)
    joining = span * (attention + stream) + chunks if chunks else 0
    late = attention - block.attention_early
    attend = (span * stream if span < rows else 0) + part.exchanged
    attend += span * (late + block.op_gradient + block.op_sums)
    call_rows = _CALL_ROWS[part.device] if part.call_rows is None else part.call_rows
    attend += max(min(span, call_rows) * block.op_call + logits, span * block.op_last)
    return [around + feed, around + joining, around + attend, around + rows * stream]


def _loss_bytes(network: Network, part: Part) -> int:
    """Bytes of the loss: gradients of its two factors, and the logits of one chunk."""
    compute, rows = part.sizes.compute, part.rows
    features_grad = rows * network.embed_dim * compute
    if not network.head_rows:
        return features_grad
    chunk = min(rows, max(1, _LOGITS_BYTES[part.device] // (FLOAT32 * network.head_rows)))
    weight = network.head_rows * network.embed_dim
    logits = chunk * network.head_rows
    num_bytes = features_grad + rows * 4 * FLOAT32 + (logits + weight) * FLOAT32
    if compute < FLOAT32:
        # Products of half types exist beside their sums; a CPU adds a copy in float32.
        num_bytes += (logits + weight) * compute
        num_bytes += weight * FLOAT32 if part.device == "cpu" else 0
    return num_bytes + (weight * compute if part.sizes.is_mixed else 0)
