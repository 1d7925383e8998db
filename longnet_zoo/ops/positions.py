"""How positions enter attention: rotary, xPos, ALiBi and T5's relative buckets, as pure functions.

- Rotary (Su et al., arXiv 2104.09864): channel pair c turns by the angle position * base^(-2c/d).
- xPos (Sun et al., arXiv 2212.10554): the logit of pair c also shrinks by
  zeta_c^((i - j) / scale_base), zeta_c = (2c/d + 0.4) / 1.4. `dilated_attention` applies it inside
  segments (`xpos_scale_base`); here are its numbers and the check of their range.
- ALiBi (Press et al., arXiv 2108.12409): each head adds -slope * |i - j| to its logits.
- T5 (Raffel et al., arXiv 1910.10683): one learned value per head and bucket of distances.

Shape legend: b batch, n seq_len, h num_heads, d head_dim, c pairs (d / 2), m distances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "alibi_slopes",
    "apply_rotary",
    "check_xpos_range",
    "float64_device",
    "relative_buckets",
    "rotary_tables",
    "xpos_factors",
    "xpos_reach",
    "xpos_zeta",
]

# Positions whose float64 angles exist at once: 16 MiB for a head of 64.
_POSITIONS_PER_CHUNK = 65_536


def rotary_tables(
    positions: Tensor, head_dim: int, *, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Computes cosine and sine of the rotary angles, exact at any position.

    Angles are float64 until their cosine and sine are taken: float32 angles are off by 0.06 rad
    at one million, bfloat16 ones by whole turns. This happens on the CPU for devices without
    float64 (MPS).

    Args:
        positions: Absolute positions, (seq_len,).
        head_dim: Channels per head, even.
        base: Ratio of the longest to the shortest wavelength.

    Returns:
        Cosine and sine, each float32 (seq_len, head_dim / 2), on the device of `positions`.

    Raises:
        ValueError: If `head_dim` is odd or `base` is not above 1.
    """
    _check_head_dim(head_dim)
    if not base > 1.0:
        raise ValueError(f"base must be above 1, got {base}. The usual value is 10000.")
    device = positions.device
    work_device = float64_device(device)
    pairs = torch.arange(head_dim // 2, device=work_device, dtype=torch.float64)
    frequencies = base ** (-2.0 * pairs / head_dim)
    chunks = []
    positions = positions.to(work_device)
    # A compiler makes no float64 tables, but would make a graph for every number of chunks.
    is_compiling = torch.compiler.is_compiling()
    for chunk in (positions,) if is_compiling else positions.split(_POSITIONS_PER_CHUNK):
        angles = chunk.to(torch.float64)[:, None] * frequencies
        chunks.append((angles.cos().float(), angles.sin().float()))
    if len(chunks) == 1:
        cos, sin = chunks[0]
    else:
        cos = torch.cat([chunk[0] for chunk in chunks])
        sin = torch.cat([chunk[1] for chunk in chunks])
    return cos.to(device), sin.to(device)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each channel pair (2c, 2c + 1) of `x` by its angle.

    The pairs are neighbouring channels, as in the paper and torchscale (other code bases pair
    channel c with c + d/2: the same model with permuted projection weights).

    Args:
        x: Queries or keys, (batch, seq_len, num_heads, head_dim).
        cos: Cosines of the angles, (seq_len, head_dim / 2).
        sin: Sines of the angles, (seq_len, head_dim / 2).

    Returns:
        The rotated tensor in the dtype of `x`; half types are rotated in float32.

    Raises:
        ValueError: If the tables do not fit `x`.
    """
    if x.ndim != 4 or cos.shape != (x.shape[1], x.shape[3] // 2) or sin.shape != cos.shape:
        raise ValueError(
            "cos and sin must be (seq_len, head_dim / 2) for x of (batch, seq_len, num_heads, "
            f"head_dim), got x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin "
            f"{tuple(sin.shape)}."
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    pairs = x.to(dtype).contiguous().unflatten(-1, (-1, 2))
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    is_complex_fast = x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    turn = _turn_complex if is_complex_fast else _turn_real
    return turn(pairs, cos, sin).flatten(-2).to(x.dtype)


def _turn_complex(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # One pass over memory instead of six: about four times as fast in eager mode.
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))


def _turn_real(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # For the compiler, which fuses this but not complex numbers, and for devices without them.
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def float64_device(device: torch.device | str) -> torch.device:
    """Where float64 is computed for a device: on the CPU for MPS, which has none."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def xpos_zeta(head_dim: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Computes xPos's decay per channel pair, zeta_c = (2c/d + 0.4) / 1.4: float64 (head_dim / 2,).

    Args:
        head_dim: Channels per head, even.
        device: Where it is computed; one with float64.

    Raises:
        ValueError: If `head_dim` is odd.
    """
    _check_head_dim(head_dim)
    channels = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
    return (channels / head_dim + 0.4) / 1.4


def xpos_factors(places: Tensor, *, head_dim: int, scale_base: float, dtype: torch.dtype) -> Tensor:
    """Computes zeta ** (place / scale_base): xPos's factor of queries; keys take the inverse.

    Args:
        places: Places, float64 (m,), counted from where factors are to be 1.
        head_dim: Channels per head, even.
        scale_base: xPos's scale base, in positions.
        dtype: Dtype of the factors.

    Returns:
        The factors, (m, head_dim), the same for channels 2c and 2c + 1.
    """
    log_zeta = xpos_zeta(head_dim, device=places.device).log()
    factors = torch.exp(places[:, None] / scale_base * log_zeta)
    return factors.to(dtype).repeat_interleave(2, dim=1)


def xpos_reach(*, scale_base: float, is_causal: bool, dtype: torch.dtype) -> int:
    """Returns how many positions a segment may have before xPos overflows; see the check below."""
    log_decay = math.log(1.4 / 0.4) / scale_base  # ln(1 / zeta_0); no other pair decays faster.
    return int(2 * _largest_log_factor(is_causal, dtype) / log_decay)


def check_xpos_range(
    *, span: int, head_dim: int, scale_base: float, is_causal: bool, dtype: torch.dtype
) -> None:
    """Checks that xPos can be applied inside a segment without overflow.

    Queries are multiplied by zeta^(t / scale_base) and keys by its inverse, t counted from the
    middle of the segment, so the largest factor is F = zeta_0^(-span / 2 / scale_base). It must
    fit `dtype` with room for the tensor that it multiplies. If attention looks ahead, logits grow
    by up to F^2, which must fit the type that logits are summed in (at least float32).

    Args:
        span: Positions of the segment.
        head_dim: Channels per head.
        scale_base: xPos's scale base, in positions; 512 in the paper.
        is_causal: Whether queries see no later key.
        dtype: Dtype that queries and keys have when they are multiplied.

    Raises:
        ValueError: If a factor or logit may overflow, or `scale_base` is not positive.
    """
    if not scale_base > 0.0:
        raise ValueError(
            f"scale_base must be positive, got scale_base={scale_base}. The usual value is 512."
        )
    _check_head_dim(head_dim)
    limit = _largest_log_factor(is_causal, dtype)
    decay_per_position = math.log(1.4 / 0.4)  # ln(1 / zeta_0); no other pair decays faster.
    needed = math.ceil(span / 2 * decay_per_position / limit)
    if span / 2 * decay_per_position / scale_base > limit:
        mode = "causal" if is_causal else "bidirectional"
        raise ValueError(
            f"xPos with scale_base={scale_base} overflows {dtype} in a segment of {span} positions "
            f"({mode} attention): factors would reach "
            f"exp({span / 2 * decay_per_position / scale_base:.0f}), the limit is "
            f"exp({limit:.0f}). Use scale_base={needed} or more (of a model: xpos_scale_base), or "
            f"shorter segments{', or bfloat16' if dtype == torch.float16 else ''}."
        )


def _largest_log_factor(is_causal: bool, dtype: torch.dtype) -> float:
    # Room for the values that are multiplied: up to e^11 (60,000); float16, whose largest value is
    # e^11.09, leaves room for e^5 (148).
    headroom = 5.0 if dtype == torch.float16 else 11.0
    factor_limit = math.log(torch.finfo(dtype).max) - headroom
    if is_causal:
        return factor_limit
    sum_dtype = torch.promote_types(dtype, torch.float32)
    return min(factor_limit, (math.log(torch.finfo(sum_dtype).max) - 3.7) / 2)


def alibi_slopes(num_heads: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Computes ALiBi's slope per head: float32 (num_heads,).

    For a power of two the slopes are 2^(-8/h), 2^(-16/h), ..., 2^-8. Otherwise they are those of
    the next lower power of two p, then every other one of 2p, as in the paper's code.

    Args:
        num_heads: Number of heads.
        device: Where they are computed, so that no copy stalls a GPU or ends a CUDA graph.

    Raises:
        ValueError: If `num_heads` is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}.")
    power = 2 ** (num_heads.bit_length() - 1)
    heads = torch.arange(num_heads, device=float64_device(device), dtype=torch.float64)
    exponents = torch.where(heads < power, 8 * (heads + 1), 4 * (2 * (heads - power) + 1)) / power
    return (2.0**-exponents).float().to(device)


def relative_buckets(
    distances: Tensor, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> Tensor:
    """Sorts distances into T5's buckets: short ones exact, longer ones logarithmic.

    With e exact buckets (half of a direction's m buckets), |distance| x falls into bucket x if
    x < e, else into e + floor((m - e) * ln(x / e) / ln(max_distance / e)), at most m - 1.
    Bidirectional: half the buckets for keys at or before the query, the other half for later
    keys. Otherwise later keys share bucket 0.

    Args:
        distances: Key position minus query position, int64 of any shape.
        num_buckets: Number of buckets, of both directions together.
        max_distance: Distance from which on all share the last bucket.
        bidirectional: Whether later keys have buckets of their own.

    Returns:
        Buckets in [0, num_buckets), int64, shape of `distances`.

    Raises:
        ValueError: If `num_buckets` or `max_distance` is too small, or `num_buckets` is odd and
            `bidirectional`.
    """
    num_directed = num_buckets // 2 if bidirectional else num_buckets
    num_exact = num_directed // 2
    if num_exact < 1 or (bidirectional and num_buckets % 2):
        rule = "an even number of at least 4 if bidirectional" if bidirectional else "at least 2"
        raise ValueError(f"num_buckets must be {rule}, got num_buckets={num_buckets}.")
    if max_distance <= num_exact:
        raise ValueError(
            "max_distance must exceed the number of exact buckets, got "
            f"max_distance={max_distance} and {num_exact} exact of num_buckets={num_buckets}."
        )
    starts = _bucket_starts(num_directed, num_exact, max_distance, distances.device)
    lengths = distances.abs() if bidirectional else (-distances).clamp(min=0)
    buckets = torch.bucketize(lengths, starts, right=True)
    if bidirectional:
        buckets = buckets + (distances > 0) * num_directed
    return buckets


def _bucket_starts(
    num_directed: int, num_exact: int, max_distance: int, device: torch.device
) -> Tensor:
    # Integers, so that no rounding of a logarithm moves a distance to its neighbour's bucket; the
    # small amount is subtracted for powers that are whole numbers but for rounding. Made on the
    # device, since a copy would stall a GPU and end a CUDA graph.
    ratio, num_log = max_distance / num_exact, num_directed - num_exact
    shares = torch.arange(1, num_log, device=float64_device(device), dtype=torch.float64) / num_log
    logarithmic = (num_exact * ratio**shares - 1e-9 * max_distance).ceil()
    exact = torch.arange(1, num_exact + 1, device=device)
    return torch.cat([exact, logarithmic.to(device, torch.int64)])


def _check_head_dim(head_dim: int) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even to form channel pairs, got head_dim={head_dim}.")
