"""The backward kernels of dilated attention in Triton: gradients of queries, keys and values.

Every launch takes the output and log-sum-exp (LSE) of the whole softmax, all branches included, so
its weights P = exp(logits - LSE) and delta = rowsum(out_grad * out) - lse_grad are the joint ones:
the logits have the gradient P * (out_grad v^T - delta). As in the forward pass, the branches of
rates above 1 write partials, and the last launch adds those to its own gradients and writes each
row once. Nothing is added atomically, so results repeat to the bit.

Shape legend: M query rows of a tile, N key rows of a tile, D head_dim, filled up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import (
    LOG2_E,
    add_partials,
    head_of,
    is_kept,
    load_tile,
    locate_tile,
    logits_of,
    multiply,
    numbers_of,
    store_tile,
    tile_rows,
)
from .triton_tuning import autotuned

__all__ = ["key_gradients", "logit_gradients", "query_gradient", "row_deltas", "row_statistics"]

_VARYING = ["first_head", "num_partials", "branch"]


@triton.jit
def row_deltas(
    out_grad,
    out,
    lse_grad,
    delta,
    problem,
    kind,
    HAS_LSE_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Computes rowsum(out_grad * out) - lse_grad; grid (row tiles of all the batch, heads)."""
    num_tiles = tl.cdiv(problem.seq_len, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    rows = (tl.program_id(0) % num_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_used = rows < problem.seq_len
    grad_base = out_grad.base + batch * out_grad.batch + head * out_grad.head
    grad = load_tile(grad_base, rows, out_grad.row, is_used, kind, True)
    numbers = (batch * problem.seq_len + rows) * problem.num_heads + head
    result = load_tile(out, numbers, kind.head_dim, is_used, kind, True)
    deltas = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    if HAS_LSE_GRAD:
        deltas -= tl.load(lse_grad + numbers, is_used, other=0.0)
    tl.store(delta + numbers, deltas, is_used)


@autotuned("query_gradient")
@triton.jit(do_not_specialize=_VARYING)
def query_gradient(
    q,
    k,
    v,
    out_grad,
    lse,
    delta,
    q_grad,
    partial_grad,
    problem,
    kind,
    first_head,
    num_partials,
    branch,
    SORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of a tile of query rows; grid (tiles of the longest sequence, heads, sequences)."""
    head = first_head + tl.program_id(1)
    segment, first_row, _, partial = locate_tile(
        problem, kind, tl.program_id(2), branch, head, tl.program_id(0), BLOCK_M
    )
    num_rows = segment[6]
    if first_row >= num_rows:
        return
    rows, positions, tokens, is_used = tile_rows(first_row, segment, problem, kind, BLOCK_M)
    in_pass = tl.program_id(1).to(tl.int64) * num_partials
    numbers = numbers_of(tokens, segment, head, problem, problem.num_heads)
    sums = tl.zeros([BLOCK_M, kind.block_d], tl.float32)
    if kind.attends:
        q_tile = load_tile(head_of(q, segment, head), tokens, q.row, is_used, kind, True)
        grad_base = head_of(out_grad, segment, head)
        grad_tile = load_tile(grad_base, tokens, out_grad.row, is_used, kind, True)
        row_lse, row_delta = row_statistics(lse, delta, numbers, is_used)
        queries = (q_tile, grad_tile, rows, positions, row_lse, row_delta)
        place = (segment, head, branch)
        # Tiles of keys that every row sees need no checks.
        checked_from = (first_row if kind.is_causal else num_rows) // BLOCK_N * BLOCK_N
        stop = tl.minimum(num_rows, first_row + BLOCK_M) if kind.is_causal else num_rows
        for first_key in range(0, checked_from, BLOCK_N):
            sums = _add_keys(sums, queries, k, v, first_key, place, problem, kind, False, BLOCK_N)
        for first_key in range(checked_from, stop, BLOCK_N):
            sums = _add_keys(sums, queries, k, v, first_key, place, problem, kind, True, BLOCK_N)
        sums *= problem.scale
    if kind.is_last:
        heads = (first_head, tl.program_id(1), 1, num_partials)
        here = (positions, is_used)
        sums = add_partials(sums, partial_grad, heads, here, segment, problem, kind)
        store_tile(q_grad, numbers, rows < num_rows, sums, kind)
    else:
        store_tile(partial_grad, in_pass + partial + rows, rows < num_rows, sums, kind)


@triton.jit
def _add_keys(
    sums,
    queries,
    k,
    v,
    first_key,
    place,
    problem,
    kind,
    CHECKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what a tile of keys gives to the gradient of a tile of queries."""
    q_tile, grad_tile, rows, positions, row_lse, row_delta = queries
    segment, head, _ = place
    keys, key_positions, tokens, is_seen = tile_rows(first_key, segment, problem, kind, BLOCK_N)
    MASKS: tl.constexpr = CHECKS or kind.has_hidden
    kv_head = head // problem.group_size
    k_tile = load_tile(head_of(k, segment, kv_head), tokens, k.row, is_seen, kind, MASKS)
    v_tile = load_tile(head_of(v, segment, kv_head), tokens, v.row, is_seen, kind, MASKS)
    _, logits_grad = logit_gradients(
        multiply(q_tile, tl.trans(k_tile), kind),
        multiply(grad_tile, tl.trans(v_tile), kind),
        (rows[:, None], positions[:, None], row_lse[:, None], row_delta[:, None]),
        (keys[None, :], key_positions[None, :], is_seen[None, :]),
        place,
        problem,
        kind,
        MASKS,
    )
    return sums + multiply(logits_grad.to(k_tile.dtype), k_tile, kind)


@autotuned("key_gradients")
@triton.jit(do_not_specialize=_VARYING)
def key_gradients(
    q,
    k,
    v,
    out_grad,
    lse,
    delta,
    k_grad,
    v_grad,
    partial_k_grad,
    partial_v_grad,
    problem,
    kind,
    first_head,
    num_partials,
    branch,
    SORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of a tile of keys and values; grid (tiles, heads, sequences).

    Heads are query heads, whose rows differ, but in the last launch key heads: it goes through the
    query heads that share one.
    """
    num_heads = problem.group_size if kind.is_last else 1
    in_pass = tl.program_id(1) * num_heads
    segment, first_key, _, partial = locate_tile(
        problem, kind, tl.program_id(2), branch, first_head + in_pass, tl.program_id(0), BLOCK_N
    )
    if first_key >= segment[6]:
        return
    keys, positions, tokens, is_used = tile_rows(first_key, segment, problem, kind, BLOCK_N)
    k_sums = tl.zeros([BLOCK_N, kind.block_d], tl.float32)
    sums = (k_sums, tl.zeros_like(k_sums))
    kv_head = (first_head + in_pass) // problem.group_size
    if kind.attends:
        k_tile = load_tile(head_of(k, segment, kv_head), tokens, k.row, is_used, kind, True)
        v_tile = load_tile(head_of(v, segment, kv_head), tokens, v.row, is_used, kind, True)
        tiles = (k_tile, v_tile, keys, positions, is_used)
        begin = first_key // BLOCK_M * BLOCK_M if kind.is_causal else 0
        for index in range(num_heads):
            place = (segment, first_head + in_pass + index, branch)
            for first_row in range(begin, segment[6], BLOCK_M):
                sums = _add_queries(
                    sums, tiles, q, out_grad, lse, delta, first_row, place, problem, kind, BLOCK_M
                )
    k_sums, v_sums = sums[0] * problem.scale, sums[1]
    is_written = keys < segment[6]
    if kind.is_last:
        heads = (first_head, in_pass, num_heads, num_partials)
        here = (positions, is_used)
        k_sums = add_partials(k_sums, partial_k_grad, heads, here, segment, problem, kind)
        v_sums = add_partials(v_sums, partial_v_grad, heads, here, segment, problem, kind)
        num_kv_heads = problem.num_heads // problem.group_size
        numbers = numbers_of(tokens, segment, kv_head, problem, num_kv_heads)
        store_tile(k_grad, numbers, is_written, k_sums, kind)
        store_tile(v_grad, numbers, is_written, v_sums, kind)
    else:
        numbers = in_pass.to(tl.int64) * num_partials + partial + keys
        store_tile(partial_k_grad, numbers, is_written, k_sums, kind)
        store_tile(partial_v_grad, numbers, is_written, v_sums, kind)


@triton.jit
def _add_queries(
    sums,
    tiles,
    q,
    out_grad,
    lse,
    delta,
    first_row,
    place,
    problem,
    kind,
    BLOCK_M: tl.constexpr,
):
    """Adds what a tile of queries gives to the gradients of a tile of keys and values."""
    k_sums, v_sums = sums
    k_tile, v_tile, keys, key_positions, is_seen = tiles
    segment, head, _ = place
    rows, positions, tokens, is_used = tile_rows(first_row, segment, problem, kind, BLOCK_M)
    q_tile = load_tile(head_of(q, segment, head), tokens, q.row, is_used, kind, True)
    grad_base = head_of(out_grad, segment, head)
    grad_tile = load_tile(grad_base, tokens, out_grad.row, is_used, kind, True)
    numbers = numbers_of(tokens, segment, head, problem, problem.num_heads)
    row_lse, row_delta = row_statistics(lse, delta, numbers, is_used)
    weights, logits_grad = logit_gradients(
        multiply(k_tile, tl.trans(q_tile), kind),
        multiply(v_tile, tl.trans(grad_tile), kind),
        (rows[None, :], positions[None, :], row_lse[None, :], row_delta[None, :]),
        (keys[:, None], key_positions[:, None], is_seen[:, None]),
        place,
        problem,
        kind,
        True,
    )
    v_sums += multiply(weights.to(grad_tile.dtype), grad_tile, kind)
    return k_sums + multiply(logits_grad.to(q_tile.dtype), q_tile, kind), v_sums


@triton.jit
def row_statistics(lse, delta, numbers, is_used):
    """Loads LSE to the base 2 and delta of rows; a row that saw nothing gets +inf: no weights."""
    row_lse = tl.load(lse + numbers, is_used, other=float("inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    return row_lse, tl.load(delta + numbers, is_used, other=0.0)


@triton.jit
def logit_gradients(
    products, weights_grad, queries, keys, place, problem, kind, CHECKS: tl.constexpr
):
    """Returns the weights, after dropout, and the gradient of the logits over `scale`.

    `queries` (row, position, LSE, delta) and `keys` (row, position, whether seen) lie along the two
    axes of `products` = q k^T and `weights_grad` = out_grad v^T, whichever axis is which.
    """
    rows, positions, row_lse, row_delta = queries
    key_rows, key_positions, is_seen = keys
    segment, head, branch = place
    axes = (rows, key_rows, is_seen)
    logits = logits_of(products, axes, segment, head, problem, kind, CHECKS)
    weights = tl.exp2(logits - row_lse)
    if kind.has_dropout:
        kept = is_kept(positions, key_positions, segment, head, branch, problem)
        factors = tl.where(kept, 1.0 / (1.0 - problem.dropout_p), 0.0)
        return weights * factors, weights * (weights_grad * factors - row_delta)
    else:
        return weights, weights * (weights_grad - row_delta)
