"""Dilated attention by counting on fingers: Python integers, lists and loops, one row at a time."""

import math
from collections.abc import Sequence


def head_offset(kind: str, head: int, num_heads: int, rate: int) -> int:
    if kind == "modulo":
        return head % rate
    return head // math.ceil(num_heads / rate)


def keys_of_query(
    pattern, query: int, seq_len: int, head: int, num_heads: int, is_causal: bool
) -> tuple[list[int], int]:
    """The keys one query sees, repeated as often as seen, and the number of its zero keys."""
    keys: list[int] = []
    zero_keys = 0
    for segment_length, rate in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        width = min(segment_length, seq_len)
        offset = head_offset(pattern.head_offset, head, num_heads, rate)
        segment, place = divmod(query, width)
        if place % rate != offset:
            continue
        slots = [segment * width + offset + t * rate for t in range(math.ceil(width / rate))]
        end = min((segment + 1) * width, seq_len)
        members = [key for key in slots if key < end]
        keys += [key for key in members if key <= query or not is_causal]
        if pattern.padded_keys == "zero" and not is_causal:
            zero_keys += len(slots) - len(members)
    return keys, zero_keys


def attend(
    logits: Sequence[float], values: Sequence[Sequence[float]], zero_keys: int, head_dim: int
) -> tuple[list[float], float]:
    """Softmax of the logits and of `zero_keys` zeros: output and log-sum-exp of one row."""
    everything = [*logits, *([0.0] * zero_keys)]
    if not everything:
        return [0.0] * head_dim, -math.inf
    top = max(everything)
    total = math.fsum(math.exp(logit - top) for logit in everything)
    weights = [math.exp(logit - top) / total for logit in logits]
    columns = list(zip(*values, strict=True)) if values else [()] * head_dim
    out = [math.fsum(w * x for w, x in zip(weights, column, strict=True)) for column in columns]
    return out, top + math.log(total)


def xpos_dot(
    query: Sequence[float], key: Sequence[float], distance: int, base: float | None
) -> float:
    """The dot product, channel by channel, with the xPos decay of `distance` = query - key."""
    head_dim = len(query)
    total = []
    for channel, (x, y) in enumerate(zip(query, key, strict=True)):
        zeta = (2 * (channel // 2) / head_dim + 0.4) / 1.4
        total.append(x * y * (1.0 if base is None else zeta ** (distance / base)))
    return math.fsum(total)


def row(q, k, v, pattern, batch, query, head, *, is_causal, scale, base=None, bias=None):
    """Output (list) and log-sum-exp of one row of q (b, n, h, d), k and v (b, n, h_kv, d)."""
    seq_len, num_heads, head_dim = q.shape[1:]
    kv_head = head // (num_heads // k.shape[2])
    keys, zero_keys = keys_of_query(pattern, query, seq_len, head, num_heads, is_causal)
    vector = q[batch, query, head].tolist()
    logits = []
    for key in keys:
        dot = xpos_dot(vector, k[batch, key, kv_head].tolist(), query - key, base)
        logits.append(scale * dot + (0.0 if bias is None else bias(key - query, head)))
    values = [v[batch, key, kv_head].tolist() for key in keys]
    return attend(logits, values, zero_keys, head_dim)
