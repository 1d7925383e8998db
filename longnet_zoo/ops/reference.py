"""Dilated attention written out densely in float64: slow, obvious, and right.

The oracle of the tests. For every pair (query i, key j) of every head it counts the branches that
let i see j, straight from the definition of the pattern, and takes one softmax in which a key
counts as often as it is seen (LongNet, arXiv:2307.02486, Eq. 9-10). Memory is quadratic in the
sequence length and nothing here is shared with the fast path, so a mistake would have to be made
twice to go unseen. Gradients are plain autograd.

Letters: b batch, n seq_len (i a query, j a key), h heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["VisibleKeys", "dilated_attention_reference", "visible_keys"]


class PatternFields(Protocol):
    """The four plain fields of a pattern, all that the oracle reads."""

    @property
    def segment_lengths(self) -> tuple[int, ...]: ...

    @property
    def dilation_rates(self) -> tuple[int, ...]: ...

    @property
    def head_offset(self) -> str: ...

    @property
    def padded_keys(self) -> str: ...


@runtime_checkable
class BlockFields(Protocol):
    """What the oracle reads of a block-sparse branch."""

    @property
    def block_mask(self) -> Tensor: ...

    @property
    def block_size(self) -> int: ...


@runtime_checkable
class HashFields(Protocol):
    """What the oracle reads of a branch of hash buckets."""

    @property
    def num_buckets(self) -> int: ...

    @property
    def num_rounds(self) -> int: ...

    @property
    def seed(self) -> int: ...


@runtime_checkable
class SubsetFields(Protocol):
    """What the oracle reads of a branch of chosen queries and keys."""

    @property
    def queries(self) -> Tensor | None: ...

    @property
    def keys(self) -> Tensor | None: ...


BranchFields = BlockFields | HashFields | SubsetFields


class VisibleKeys(NamedTuple):
    """How often each query sees each key.

    Attributes:
        counts: Number of branches that let query i see key j, int64,
            (batch, num_heads, seq_len, seq_len).
        zero_keys: Number of zero keys (logit 0, value 0) in the softmax of each query, int64,
            (batch, num_heads, seq_len); all 0 unless `padded_keys="zero"`.
    """

    counts: Tensor
    zero_keys: Tensor


class _Documents(NamedTuple):
    """The sequence each token belongs to; every field is (batch, seq_len)."""

    document: Tensor
    position: Tensor
    length: Tensor
    is_real: Tensor


def dilated_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: PatternFields | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Tensor | Callable[[Tensor], Tensor] | None = None,
    xpos_scale_base: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    extra_branches: Sequence[BranchFields] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes dilated attention densely in float64.

    out_i = sum_j m_ij exp(s_ij) v_j / (c_i + sum_j m_ij exp(s_ij)), where m_ij is the number of
    branches in which i sees j, c_i the number of zero keys, and s_ij = scale * q_i . k_j + bias_ij.
    With xPos, channels 2c and 2c + 1 of the product are weighted by zeta_c ** ((i - j) / base),
    zeta_c = (2c / head_dim + 0.4) / 1.4. Where the denominator is 0, out is 0 and lse is -inf.

    Args:
        q: Queries, (batch, seq_len, num_heads, head_dim).
        k: Keys, (batch, seq_len, num_kv_heads, head_dim); query head i uses key head
            i // (num_heads // num_kv_heads).
        v: Values, (batch, seq_len, num_kv_heads, head_dim).
        pattern: Segment lengths, dilation rates and the two switches; None: no dilated branch.
        is_causal: Whether query i sees only keys j <= i.
        scale: Factor of the logits; 1 / sqrt(head_dim) if None.
        bias: Added to the logits: a tensor (batch or 1, num_heads or 1, seq_len, seq_len), or a
            callable from int64 distances (key - query), (m,), to (num_heads, m).
        xpos_scale_base: Base of the xPos decay, in tokens; None for none.
        key_padding_mask: Bool, (batch, seq_len), True = padding.
        cu_seqlens: Bounds of packed sequences, (num_sequences + 1,), for batch 1.
        return_lse: Whether to return the log-sum-exp as well.
        extra_branches: Further branches: block-sparse, hash buckets, chosen queries and keys.

    Returns:
        Output, float64, (batch, seq_len, num_heads, head_dim), and if `return_lse` the natural
        log-sum-exp, float64, (batch, seq_len, num_heads).
    """
    batch, seq_len, num_heads, head_dim = q.shape
    counts, zero_keys = visible_keys(
        pattern or _NoBranch,
        batch=batch,
        seq_len=seq_len,
        num_heads=num_heads,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        device=q.device,
    )
    documents = _documents("ignore", batch, seq_len, key_padding_mask, cu_seqlens, q.device)
    for branch in extra_branches:
        counts = counts + _seen_in_branch(branch, q, k, documents, is_causal=is_causal)
    q, k, v = (_heads_first(x, num_heads) for x in (q, k, v))
    logits = _products(q, k, xpos_scale_base, counts.sum((0, 1)) > 0)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    logits = logits + _dense_bias(bias, seq_len, q.device)

    # A key seen m times weighs m exp(s) = exp(s + log m); log 0 = -inf hides the others.
    logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
    logits = logits + torch.cat([counts, zero_keys[..., None]], dim=-1).double().log()
    is_empty = torch.isneginf(logits).all(dim=-1, keepdim=True)
    logits = torch.where(is_empty, 0.0, logits)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    weights = torch.exp(logits - lse)[..., :-1]
    out = torch.where(is_empty, 0.0, weights @ v).transpose(1, 2)
    if not return_lse:
        return out
    return out, torch.where(is_empty, -torch.inf, lse).squeeze(-1).transpose(1, 2)


def visible_keys(
    pattern: PatternFields,
    *,
    batch: int,
    seq_len: int,
    num_heads: int,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> VisibleKeys:
    """Counts how many branches let each query see each key, from the definition of the pattern.

    Args:
        pattern: Segment lengths, dilation rates and the two switches.
        batch: Number of sequences.
        seq_len: Tokens per sequence.
        num_heads: Number of query heads.
        is_causal: Whether query i sees only keys j <= i.
        key_padding_mask: Bool, (batch, seq_len), True = padding.
        cu_seqlens: Bounds of packed sequences, (num_sequences + 1,), for batch 1.
        device: Where to count.

    Returns:
        The counts and the numbers of zero keys.

    Raises:
        ValueError: `key_padding_mask` is given with `cu_seqlens`, or it is not right-padding
            although the pattern has `padded_keys="zero"`.
    """
    documents = _documents(
        pattern.padded_keys, batch, seq_len, key_padding_mask, cu_seqlens, device
    )
    same_document = _pairs_equal(documents.document) & _pairs(documents.is_real, torch.logical_and)
    order = torch.arange(seq_len, device=device)
    counts = torch.zeros(batch, num_heads, seq_len, seq_len, dtype=torch.int64, device=device)
    zero_keys = torch.zeros(batch, num_heads, seq_len, dtype=torch.int64, device=device)

    for segment_length, rate in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        width = documents.length.clamp(min=1, max=segment_length)
        segment, place = documents.position // width, documents.position % width
        offset = _offsets(pattern.head_offset, rate, num_heads, device)
        taken = (place[:, None] % rate) == offset[:, None]
        seen = _pairs(taken, torch.logical_and)
        seen = seen & (same_document & _pairs_equal(segment))[:, None]
        if pattern.padded_keys == "zero" and not is_causal:
            slots = (width + rate - 1) // rate
            present = taken & documents.is_real[:, None]
            zero_keys += torch.where(present, slots[:, None] - seen.sum(-1), 0)
        counts += (seen & (order <= order[:, None])) if is_causal else seen
    return VisibleKeys(counts, zero_keys)


class _NoBranch:
    """A pattern without branches."""

    segment_lengths = dilation_rates = ()
    head_offset, padded_keys = "modulo", "ignore"


def _seen_in_branch(
    branch: BranchFields, q: Tensor, k: Tensor, documents: _Documents, *, is_causal: bool
) -> Tensor:
    """How often query i sees key j in a branch, int64, (b, h, i, j)."""
    order = torch.arange(q.shape[1], device=q.device)
    allowed = _pairs_equal(documents.document) & _pairs(documents.is_real, torch.logical_and)
    allowed = allowed & (order <= order[:, None]) if is_causal else allowed
    if isinstance(branch, BlockFields):
        block = documents.position // branch.block_size
        mask = branch.block_mask.expand(q.shape[2], *branch.block_mask.shape[-2:])
        seen = mask[:, block[:, :, None], block[:, None, :]].transpose(0, 1).long()
    elif isinstance(branch, HashFields):
        seen = _equal_hashes(branch, q, k)
    else:
        everything = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
        queries, keys = (x if x is not None else everything for x in (branch.queries, branch.keys))
        seen = torch.einsum("bih,bjh->bhij", queries.long(), keys.long())
    return seen * allowed[:, None]


def _equal_hashes(branch: HashFields, q: Tensor, k: Tensor) -> Tensor:
    """In how many rounds query i and key j of a head have the same hash, (b, h, i, j)."""
    num_kv_heads, half = k.shape[2], branch.num_buckets // 2
    generator = torch.Generator().manual_seed(branch.seed)
    shape = (num_kv_heads, branch.num_rounds, q.shape[3], half)
    matrices = torch.randn(shape, generator=generator).to(q.device).double()
    matrices = matrices / matrices.square().sum(2, keepdim=True).sqrt()

    def hashes(x: Tensor) -> Tensor:
        by_head = matrices.repeat_interleave(x.shape[2] // num_kv_heads, dim=0)
        products = torch.einsum("bnhd,hrdm->rbhnm", x.detach().double(), by_head)
        return torch.cat([products, -products], dim=-1).argmax(-1)

    key_hashes = hashes(k).repeat_interleave(q.shape[2] // num_kv_heads, dim=2)
    return (hashes(q)[..., :, None] == key_hashes[..., None, :]).sum(0)


def _offsets(head_offset: str, rate: int, num_heads: int, device: object) -> Tensor:
    """The offset of each head in a branch of this rate, (num_heads,)."""
    heads = torch.arange(num_heads, device=device)  # type: ignore[call-overload]
    return heads % rate if head_offset == "modulo" else heads // -(-num_heads // rate)


def _documents(
    padded_keys: str,
    batch: int,
    seq_len: int,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device | str | None,
) -> _Documents:
    """Places every token in its own sequence: the whole row, what is not padding, or a pack."""
    order = torch.arange(seq_len, device=device).expand(batch, seq_len)
    index, start = torch.zeros_like(order), torch.zeros_like(order)
    length, is_real = torch.full_like(order, seq_len), torch.ones_like(order, dtype=torch.bool)
    if cu_seqlens is not None:
        if key_padding_mask is not None:
            raise ValueError("give key_padding_mask or cu_seqlens, got both")
        bounds = cu_seqlens.to(order)
        index = torch.searchsorted(bounds, order.contiguous(), right=True) - 1
        start, length = bounds[index], bounds[index + 1] - bounds[index]
    elif key_padding_mask is not None:
        is_real = ~key_padding_mask
        is_right_padded = (is_real == (order < is_real.sum(-1, keepdim=True))).all(-1)
        if padded_keys == "zero" and not is_right_padded.all():
            rows = (~is_right_padded).nonzero().flatten().tolist()
            raise ValueError(
                f'padded_keys="zero" has a meaning for right-padded sequences only, got a '
                f"key_padding_mask with other padding in batch rows {rows}"
            )
        own = is_real.sum(-1, keepdim=True)
        length = torch.where(is_right_padded[:, None], own, seq_len).expand_as(order)
    return _Documents(index, order - start, length, is_real)


def _pairs(x: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combines each query with each key: (..., n) -> (..., i, j)."""
    return combine(x[..., :, None], x[..., None, :])


def _pairs_equal(x: Tensor) -> Tensor:
    return _pairs(x, torch.eq)


def _heads_first(x: Tensor, num_heads: int) -> Tensor:
    """Casts to float64 and repeats grouped heads: (b, n, h_kv, d) -> (b, h, n, d)."""
    return x.double().repeat_interleave(num_heads // x.shape[2], dim=2).transpose(1, 2)


def _products(q: Tensor, k: Tensor, xpos_scale_base: float | None, is_seen: Tensor) -> Tensor:
    """Dot products of all queries and keys, (b, h, i, j), with the xPos decay if asked for.

    Args:
        q: Queries, (b, h, n, d).
        k: Keys, (b, h, n, d).
        xpos_scale_base: Base of the decay, or None.
        is_seen: Pairs that any head sees, (i, j); the decay of the others is left out, since it
            may overflow.
    """
    if xpos_scale_base is None:
        return q @ k.transpose(-1, -2)
    head_dim = q.shape[-1]
    order = torch.arange(q.shape[-2], dtype=torch.float64, device=q.device)
    exponent = torch.where(is_seen, order[:, None] - order, 0.0) / xpos_scale_base
    total = torch.zeros_like(q @ k.transpose(-1, -2))
    for channel in range(0, head_dim, 2):
        zeta = (channel / head_dim + 0.4) / 1.4
        pair = slice(channel, channel + 2)
        total = total + zeta**exponent * (q[..., pair] @ k[..., pair].transpose(-1, -2))
    return total


def _dense_bias(
    bias: Tensor | Callable[[Tensor], Tensor] | None, seq_len: int, device: torch.device
) -> Tensor | float:
    """The bias of every pair, (b or 1, h or 1, i, j)."""
    if bias is None:
        return 0.0
    if isinstance(bias, Tensor):
        return bias.double()
    distances = torch.arange(1 - seq_len, seq_len, device=device)
    order = torch.arange(seq_len, device=device)
    return bias(distances).double()[None, :, order - order[:, None] + seq_len - 1]
