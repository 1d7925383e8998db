"""The forward kernel of dilated attention in Triton: one branch, all its segments and heads.

The branches of rates above 1 run first, each on its own rows only, and write partials: an output
and a log-sum-exp (LSE) for each of their rows, float32. The last launch covers every row: it
attends the branch of rate 1, merges what the other branches left for its rows, and writes each row
once in its final form. Where a pattern has no such branch, the last launch only merges.

Shape legend: M query rows of a tile, N key rows of a tile, D head_dim, filled up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import (
    LOG2_E,
    head_of,
    is_kept,
    load_tile,
    locate_partials,
    locate_tile,
    logits_of,
    multiply,
    numbers_of,
    store_tile,
    tile_rows,
)
from .triton_tuning import autotuned

__all__ = ["attend_rows"]


@autotuned("forward")
@triton.jit(do_not_specialize=["first_head", "num_partials", "branch"])
def attend_rows(
    q,
    k,
    v,
    out,
    lse,
    partial_out,
    partial_lse,
    problem,
    kind,
    first_head,
    num_partials,
    branch,
    SORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attends a tile of query rows; grid (tiles of the longest sequence, heads, sequences)."""
    head = first_head + tl.program_id(1)
    segment, first_row, full_rows, partial = locate_tile(
        problem, kind, tl.program_id(2), branch, head, tl.program_id(0), BLOCK_M
    )
    if first_row >= segment[6]:
        return
    rows, positions, tokens, is_used = tile_rows(first_row, segment, problem, kind, BLOCK_M)
    in_pass = tl.program_id(1).to(tl.int64) * num_partials
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = (largest, tl.zeros_like(largest), tl.zeros([BLOCK_M, kind.block_d], tl.float32))
    if kind.attends:
        q_tile = load_tile(head_of(q, segment, head), tokens, q.row, is_used, kind, True)
        queries = (q_tile, rows, positions)
        state = _attend_segment(
            state, queries, k, v, first_row, segment, head, branch, problem, kind, BLOCK_M, BLOCK_N
        )
        if kind.zero_keys:
            # All of them at once: logit 0, value 0.
            num_zeros = full_rows - segment[6]
            zero = tl.where(num_zeros > 0, tl.zeros_like(largest), float("-inf"))
            state = _merge(state, zero, num_zeros, tl.zeros_like(state[2]))
    is_written = rows < segment[6]
    if kind.is_last:
        for index in range(kind.num_others):
            other, exists = locate_partials(index, positions, segment, head, problem)
            other, exists = other + in_pass, exists & is_used
            new_largest = tl.load(partial_lse + other, exists, other=float("-inf"))
            new_sums = load_tile(partial_out, other, kind.head_dim, exists, kind, True)
            state = _merge(state, new_largest, 1.0, new_sums)
        result, row_lse = _normalized(state, is_used)
        numbers = numbers_of(tokens, segment, head, problem, problem.num_heads)
        store_tile(out, numbers, is_written, result, kind)
        tl.store(lse + numbers, row_lse / LOG2_E, is_written)
    else:
        result, row_lse = _normalized(state, is_used)
        numbers = in_pass + partial + rows
        store_tile(partial_out, numbers, is_written, result, kind)
        tl.store(partial_lse + numbers, row_lse, is_written)


@triton.jit
def _attend_segment(
    state,
    queries,
    k,
    v,
    first_row,
    segment,
    head,
    branch,
    problem,
    kind,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Runs the online softmax of a tile of queries over the keys of its segment."""
    num_rows = segment[6]
    # Tiles of keys that every row sees need no checks.
    checked_from = (first_row if kind.is_causal else num_rows) // BLOCK_N * BLOCK_N
    stop = tl.minimum(num_rows, first_row + BLOCK_M) if kind.is_causal else num_rows
    for first_key in range(0, checked_from, BLOCK_N):
        state = _attend_keys(
            state, queries, k, v, first_key, segment, head, branch, problem, kind, False, BLOCK_N
        )
    for first_key in range(checked_from, stop, BLOCK_N):
        state = _attend_keys(
            state, queries, k, v, first_key, segment, head, branch, problem, kind, True, BLOCK_N
        )
    return state


@triton.jit
def _attend_keys(
    state,
    queries,
    k,
    v,
    first_key,
    segment,
    head,
    branch,
    problem,
    kind,
    CHECKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds a tile of keys to the online softmax of a tile of queries."""
    largest, total, sums = state
    q_tile, rows, positions = queries
    keys, key_positions, tokens, is_seen = tile_rows(first_key, segment, problem, kind, BLOCK_N)
    MASKS: tl.constexpr = CHECKS or kind.has_hidden
    kv_head = head // problem.group_size
    k_tile = load_tile(head_of(k, segment, kv_head), tokens, k.row, is_seen, kind, MASKS)
    products = multiply(q_tile, tl.trans(k_tile), kind)
    axes = (rows[:, None], keys[None, :], is_seen[None, :])
    logits = logits_of(products, axes, segment, head, problem, kind, MASKS)
    joint = tl.maximum(largest, tl.max(logits, 1))
    anchor = _finite(joint)
    weights = tl.exp2(logits - anchor[:, None])
    shrink = tl.exp2(largest - anchor)
    total = total * shrink + tl.sum(weights, 1)
    if kind.has_dropout:
        kept = is_kept(positions[:, None], key_positions[None, :], segment, head, branch, problem)
        weights = tl.where(kept, weights / (1.0 - problem.dropout_p), 0.0)
    v_tile = load_tile(head_of(v, segment, kv_head), tokens, v.row, is_seen, kind, MASKS)
    sums = sums * shrink[:, None] + multiply(weights.to(v_tile.dtype), v_tile, kind)
    return joint, total, sums


@triton.jit
def _merge(state, new_largest, new_total, new_sums):
    """Joins an online softmax with another one over other keys."""
    largest, total, sums = state
    joint = tl.maximum(largest, new_largest)
    anchor = _finite(joint)
    shrink, share = tl.exp2(largest - anchor), tl.exp2(new_largest - anchor)
    sums = sums * shrink[:, None] + new_sums * share[:, None]
    return joint, total * shrink + new_total * share, sums


@triton.jit
def _normalized(state, is_used):
    """Output and LSE to the base 2; zeros and -inf for a row that is hidden or saw no key."""
    largest, total, sums = state
    has_keys = is_used & (total > 0.0)
    divisor = tl.where(has_keys, total, 1.0)
    out = tl.where(has_keys[:, None], sums / divisor[:, None], 0.0)
    return out, tl.where(has_keys, largest + tl.log2(divisor), float("-inf"))


@triton.jit
def _finite(largest):
    # exp(-inf - -inf) would be NaN for a row that has seen no key yet.
    return tl.where(largest == float("-inf"), 0.0, largest)
