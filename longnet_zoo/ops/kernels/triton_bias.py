"""The gradient of a bias by distance in Triton.

All tiles whose first key lies equally far from their first row form a *band*. They hold the same
distances at the same places, so a programme adds up the gradients of a band's logits in registers,
over all segments and sequences, and writes one square tile. Its diagonals are summed afterwards.

Shape legend: B rows and keys of a tile, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward import logit_gradients, row_statistics
from .triton_parts import head_of, load_tile, locate_tile, multiply, numbers_of, tile_rows

__all__ = ["bias_gradient"]


@triton.jit(do_not_specialize=["branch", "num_sequences", "first_band"])
def bias_gradient(
    q,
    k,
    v,
    out_grad,
    lse,
    delta,
    bands,
    problem,
    kind,
    branch,
    num_sequences,
    first_band,
    BLOCK: tl.constexpr,
):
    """Sums the tiles of a band; grid (bands, heads, shares of the tiles), bands: its reverse, B, B.

    A share is every so manieth tile.
    """
    head = tl.program_id(1)
    band = first_band + tl.program_id(0)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for sequence in range(num_sequences):
        length = tl.load(problem.sequences + sequence * (3 + kind.num_others) + 2).to(tl.int32)
        width = tl.minimum(tl.load(problem.branches + 2 * branch), length)
        step = 1 if kind.is_last else tl.load(problem.branches + 2 * branch + 1)
        num_tiles = tl.cdiv(length, width) * tl.cdiv(tl.cdiv(width, step), BLOCK)
        for tile in range(tl.program_id(2), num_tiles, tl.num_programs(2)):
            segment, first_row, _, _ = locate_tile(
                problem, kind, sequence + 0 * head, branch, head, tile, BLOCK
            )
            first_key = first_row + band * BLOCK
            if (first_row < segment[6]) & (first_key >= 0) & (first_key < segment[6]):
                tensors = (q, k, v, out_grad, lse, delta)
                place = (segment, head, branch)
                sums += _tile_gradient(tensors, first_row, first_key, place, problem, kind, BLOCK)
    share = tl.program_id(2) * tl.num_programs(1) + head
    number = (share * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    rows, keys = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(bands + number * BLOCK * BLOCK + rows * BLOCK + keys, sums)


@triton.jit
def _tile_gradient(tensors, first_row, first_key, place, problem, kind, BLOCK: tl.constexpr):
    """The gradient of the logits of one tile, (B, B)."""
    q, k, v, out_grad, lse, delta = tensors
    segment, head, _ = place
    kv_head = head // problem.group_size
    rows, positions, tokens, is_used = tile_rows(first_row, segment, problem, kind, BLOCK)
    keys, key_positions, key_tokens, is_seen = tile_rows(first_key, segment, problem, kind, BLOCK)
    q_tile = load_tile(head_of(q, segment, head), tokens, q.row, is_used, kind, True)
    grad_base = head_of(out_grad, segment, head)
    grad_tile = load_tile(grad_base, tokens, out_grad.row, is_used, kind, True)
    k_tile = load_tile(head_of(k, segment, kv_head), key_tokens, k.row, is_seen, kind, True)
    v_tile = load_tile(head_of(v, segment, kv_head), key_tokens, v.row, is_seen, kind, True)
    numbers = numbers_of(tokens, segment, head, problem, problem.num_heads)
    row_lse, row_delta = row_statistics(lse, delta, numbers, is_used)
    _, logits_grad = logit_gradients(
        multiply(q_tile, tl.trans(k_tile), kind),
        multiply(grad_tile, tl.trans(v_tile), kind),
        (rows[:, None], positions[:, None], row_lse[:, None], row_delta[:, None]),
        (keys[None, :], key_positions[None, :], is_seen[None, :]),
        place,
        problem,
        kind,
        True,
    )
    return logits_grad
