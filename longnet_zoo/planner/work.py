"""Which rank computes how much of attention, counted in integers at any length."""

from __future__ import annotations

from collections import Counter

import numpy as np

from longnet_zoo.ops.pattern import DilatedPattern

__all__ = ["pairs_of_heads", "pairs_of_parts"]


def pairs_of_parts(
    pattern: DilatedPattern, *, seq_len: int, num_parts: int, num_heads: int, is_causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the (query, key) pairs of each part of a sequence, all heads and branches.

    Args:
        pattern: The schedule.
        seq_len: Tokens of the sequence.
        num_parts: Contiguous parts, equal but for the end of the sequence.
        num_heads: Query heads.
        is_causal: Whether a query sees no later key.

    Returns:
        Pairs with any key, and those with a key of the same part; float64 (num_parts,) each, as a
        dense sequence of a billion has more than int64 holds.
    """
    length = -(-seq_len // num_parts)
    pairs, own_pairs = np.zeros(num_parts), np.zeros(num_parts)
    for branch, (segment_length, rate) in enumerate(pattern.branches):
        segment_length = min(segment_length, seq_len)
        for offset, heads in Counter(pattern.offsets(branch, num_heads)).items():
            for part in range(num_parts):
                begin, end = min(part * length, seq_len), min((part + 1) * length, seq_len)
                for start, stop, seen, count in _pieces(begin, end, segment_length, seq_len):
                    before, rows, keys = (len(range(offset, x, rate)) for x in (start, stop, seen))
                    own = rows - before
                    if is_causal:
                        total, inside = _triangle(rows) - _triangle(before), _triangle(own)
                    else:
                        total, inside = own * keys, own * own
                    pairs[part] += heads * count * total
                    own_pairs[part] += heads * count * inside
    return pairs, own_pairs


def pairs_of_heads(
    pattern: DilatedPattern, *, seq_len: int, num_parts: int, num_heads: int, is_causal: bool
) -> np.ndarray:
    """Counts the pairs of the whole sequence by group of neighbouring heads, (num_parts,)."""
    size = num_heads // num_parts
    pairs = np.zeros(num_parts)
    for branch, (segment_length, rate) in enumerate(pattern.branches):
        full, tail = divmod(seq_len, min(segment_length, seq_len))
        for head, offset in enumerate(pattern.offsets(branch, num_heads)):
            for length, count in ((min(segment_length, seq_len), full), (tail, 1)):
                rows = len(range(offset, length, rate))
                pairs[head // size] += count * (_triangle(rows) if is_causal else rows * rows)
    return pairs


def _pieces(
    begin: int, end: int, segment_length: int, seq_len: int
) -> list[tuple[int, int, int, int]]:
    """Cuts [begin, end) at segments: (first, last + 1 and length in the segment; how many)."""
    pieces = []
    position = begin
    while position < end:
        segment, place = divmod(position, segment_length)
        num_whole = (end - position) // segment_length if place == 0 else 0
        if num_whole:
            pieces.append((0, segment_length, segment_length, num_whole))
            position += num_whole * segment_length
            continue
        start = segment * segment_length
        stop = min(end, start + segment_length)
        seen = min(segment_length, seq_len - start)
        pieces.append((place, stop - start, seen, 1))
        position = stop
    return pieces


def _triangle(rows: int) -> int:
    return rows * (rows + 1) // 2
