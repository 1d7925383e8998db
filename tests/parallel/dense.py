"""One dense softmax in float64, and what the checks of parts of sequences share."""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

LAYOUTS = ("contiguous", "striped", "zigzag")
TOLERANCE = 1e-5


def world_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def random_qkv(*, batch=2, seq_len, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float32):
    """q, k, v and a cotangent, the same on every rank."""
    shapes = [(batch, seq_len, heads, head_dim) for heads in (num_heads, num_kv_heads)]
    return [torch.randn(shapes[kind]).to(dtype) for kind in (0, 1, 1, 0)]


def visible(batch, seq_len, *, is_causal, max_lookback=None, mask=None, cu_seqlens=None):
    """Which query sees which key, (b, i, j)."""
    i, j = torch.arange(seq_len)[:, None], torch.arange(seq_len)
    seen = torch.ones(batch, seq_len, seq_len, dtype=torch.bool)
    if is_causal:
        seen &= (j <= i) & (j > i - (max_lookback or seq_len))
    if mask is not None:
        seen &= ~mask[:, None, :] & ~mask[:, :, None]
    if cu_seqlens is not None:
        document = torch.full((seq_len,), -1)
        for index, (start, stop) in enumerate(pairwise(cu_seqlens)):
            document[start:stop] = index
        seen &= (document[:, None] == document) & (document >= 0)
    return seen


def dense(q, k, v, seen, bias=None):
    """Attention in float64: out and lse, 0 and -inf where nothing is seen."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        order = torch.arange(q.shape[1])
        logits = logits + bias(order - order[:, None])
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse.transpose(1, 2)


def assert_near(actual, expected, what, tolerance=TOLERANCE):
    excess = (actual.double() - expected).abs() - tolerance * (1 + expected.abs())
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert not actual.isnan().any(), what
    assert excess.max() <= 0, (what, excess.max().item())
