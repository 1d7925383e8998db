"""What the Triton kernels of dilated attention share: where rows lie, logits, dropout, partials.

A *tile* is a few neighbouring rows of one segment, branch and head. *Partials* are the results of
one branch for its own rows, which the launch over all rows adds up. Exponents are to the base 2, as
the hardware computes them.

A *segment* is passed on as (line of the table of sequences; batch row, first token and length of
the sequence; position of its first row; step to the next row; number of rows).

Shape legend: M query rows of a tile, N key rows of a tile, D head_dim, filled up to a power of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "LOG2_E",
    "Kind",
    "Problem",
    "Rows",
    "add_partials",
    "head_of",
    "is_kept",
    "load_tile",
    "locate_partials",
    "locate_tile",
    "logits_of",
    "make_kinds",
    "multiply",
    "numbers_of",
    "store_tile",
    "tile_rows",
]

LOG2_E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """A tensor (batch, seq_len, heads, head_dim) of any strides but the last."""

    base: Any
    batch: Any
    row: Any
    head: Any


class Problem(NamedTuple):
    """What a launch reads beside the tensors.

    Triton compiles again for a number that is 1, or that 16 divides, where the last one was not.
    """

    sequences: Any  # see FusedSchedule
    branches: Any
    offsets: Any
    seq_len: Any
    num_heads: Any
    group_size: Any  # query heads for each key head
    scale: Any
    bias: Any  # by distance, float32 (num_heads, bias_length)
    bias_length: Any
    is_hidden: Any  # uint8 (batch, seq_len)
    dropout_p: Any
    seed: Any


class Kind(NamedTuple):
    """What a kernel is compiled for; every field a `tl.constexpr`."""

    head_dim: Any
    block_d: Any
    num_others: Any  # branches with partials
    is_last: Any  # covers every row and merges the partials
    attends: Any  # False: merges only
    is_causal: Any
    zero_keys: Any
    has_bias: Any
    has_hidden: Any
    has_dropout: Any
    precision: Any  # of products of float32
    upcasts: Any  # NumPy, hence Triton's interpreter, has no bfloat16


def make_kinds(
    *, num_others: int, head_dim: int, attends: bool, dtype: torch.dtype, **fields: Any
) -> list[Kind]:
    """Lists the kind of each branch of a call; the last one merges the others."""
    kinds = []
    for branch in range(num_others + 1):
        is_last = branch == num_others
        values = {
            "head_dim": head_dim,
            "block_d": max(16, triton.next_power_of_2(head_dim)),
            "num_others": num_others,
            "is_last": is_last,
            "attends": attends or not is_last,
            # Tensor cores round float32 to 10 bits: three products keep its 23 but for the last.
            "precision": "tf32x3" if dtype == torch.float32 else "tf32",
            "upcasts": dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
            **fields,
        }
        kinds.append(Kind(**{name: tl.constexpr(value) for name, value in values.items()}))
    return kinds


@triton.jit
def locate_tile(problem, kind, sequence, branch, head, tile, BLOCK: tl.constexpr):
    """Finds tile number `tile` of a branch in a sequence.

    Returns the segment, the first row of the tile, the rows of a full segment, and the number of
    the segment's first partial.
    """
    line = problem.sequences + sequence.to(tl.int64) * (3 + kind.num_others)
    length = tl.load(line + 2).to(tl.int32)
    width = tl.minimum(tl.load(problem.branches + 2 * branch), length)
    step = 1 if kind.is_last else tl.load(problem.branches + 2 * branch + 1)
    offset = 0 if kind.is_last else tl.load(problem.offsets + branch * problem.num_heads + head)
    full_rows = tl.cdiv(width, step)
    tiles_per_segment = tl.cdiv(full_rows, BLOCK)
    index = tile // tiles_per_segment
    start = index * width
    num_rows = tl.maximum(tl.minimum(width, length - start) - offset + step - 1, 0) // step
    partial = index * full_rows
    partial = partial if kind.is_last else tl.load(line + 3 + branch) + partial
    segment = (line, tl.load(line), tl.load(line + 1), length, start + offset, step, num_rows)
    return segment, (tile % tiles_per_segment) * BLOCK, full_rows, partial


@triton.jit
def tile_rows(first_row, segment, problem, kind, BLOCK: tl.constexpr):
    """Lists rows of a segment: number, position, token in the batch row, and which are in use."""
    _, batch, first, _, start, step, num_rows = segment
    rows = first_row + tl.arange(0, BLOCK)
    positions = start + rows * step
    tokens = first + positions
    is_used = rows < num_rows
    if kind.has_hidden:
        hidden = problem.is_hidden + batch * problem.seq_len + tokens
        is_used = is_used & (tl.load(hidden, is_used, other=1) == 0)
    return rows, positions, tokens, is_used


@triton.jit
def head_of(x, segment, head):
    """Address of a head's first row in the segment's batch row."""
    return x.base + segment[1] * x.batch + head.to(tl.int64) * x.head


@triton.jit
def numbers_of(tokens, segment, head, problem, num_heads):
    """Numbers of (batch row, token, head) in a contiguous tensor."""
    return (segment[1] * problem.seq_len + tokens) * num_heads + head


@triton.jit
def load_tile(base, rows, stride, is_used, kind, CHECKS: tl.constexpr):
    """Loads rows of a tensor, (rows, D); if CHECKS, zero where a row is not used."""
    channels = tl.arange(0, kind.block_d)
    pointers = base + rows[:, None] * stride + channels[None, :]
    if CHECKS:
        return tl.load(pointers, is_used[:, None] & (channels < kind.head_dim)[None, :], other=0.0)
    elif kind.head_dim < kind.block_d:
        return tl.load(pointers, (channels < kind.head_dim)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(base, rows, is_used, tile, kind):
    """Stores the used rows of a tile (rows, D) in a contiguous tensor, in its dtype."""
    channels = tl.arange(0, kind.block_d)
    pointers = base + rows[:, None] * kind.head_dim + channels[None, :]
    is_written = is_used[:, None] & (channels < kind.head_dim)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), is_written)


@triton.jit
def multiply(a, b, kind):
    """The matrix product, float32."""
    if kind.upcasts:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=kind.precision)


@triton.jit
def logits_of(products, axes, segment, head, problem, kind, CHECKS: tl.constexpr):
    """Makes logits to the base 2 of dot products.

    `axes` are rows, keys, and which keys are seen, each along its axis of the products. CHECKS:
    whether some keys are hidden, beyond the segment or ahead of their query.
    """
    rows, keys, is_seen = axes
    step, num_rows = segment[5], segment[6]
    logits = products * (problem.scale * LOG2_E)
    if kind.has_bias:
        is_inside = (rows < num_rows) & (keys < num_rows)
        middle = problem.bias + head * problem.bias_length + problem.bias_length // 2
        logits += LOG2_E * tl.load(middle + (keys - rows) * step, is_inside, other=0.0)
    if CHECKS:
        is_visible = is_seen & (keys < num_rows)
        if kind.is_causal:
            is_visible = is_visible & (keys <= rows)
        logits = tl.where(is_visible, logits, float("-inf"))
    return logits


@triton.jit
def is_kept(positions, key_positions, segment, head, branch, problem):
    """Draws which attention weights stay: a hash of where they are, the same in every kernel."""
    keys = positions * 0 + key_positions
    rows = positions + key_positions * 0
    column = keys * 0 + (branch * problem.num_heads + head)
    sequence = keys * 0 + (segment[1] * problem.seq_len + segment[2]).to(tl.int32)
    draws, _, _, _ = tl.philox(problem.seed, keys, rows, column, sequence)
    return tl.uint_to_uniform_float(draws) >= problem.dropout_p


@triton.jit
def locate_partials(branch, positions, segment, head, problem):
    """Finds the partials of positions in a branch: their numbers, and which exist."""
    line, length = segment[0], segment[3]
    width = tl.minimum(tl.load(problem.branches + 2 * branch), length)
    rate = tl.load(problem.branches + 2 * branch + 1)
    place = positions % width
    partial = tl.load(line + 3 + branch) + (positions // width) * tl.cdiv(width, rate)
    offset = tl.load(problem.offsets + branch * problem.num_heads + head)
    return partial + place // rate, place % rate == offset


@triton.jit
def add_partials(sums, partials, heads, here, segment, problem, kind):
    """Adds to a tile of gradients what the other branches found for its rows.

    `heads` are the first head of the pass, the place in it of the first one to add, how many are
    added, and the partials of each; `here` are the rows' positions and use.
    """
    first_head, in_pass, num_heads, num_partials = heads
    positions, is_used = here
    for index in range(num_heads):
        begin = (in_pass + index).to(tl.int64) * num_partials
        for branch in range(kind.num_others):
            head = first_head + in_pass + index
            partial, exists = locate_partials(branch, positions, segment, head, problem)
            exists = exists & is_used
            sums += load_tile(partials, begin + partial, kind.head_dim, exists, kind, True)
    return sums
