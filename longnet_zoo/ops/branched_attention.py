"""Dilated attention with further branches in its softmax, as operators of PyTorch.

The dilated branches run as without others; what they and each other branch find is merged by the
LSE. The backward of every branch gets the merged out and LSE.

Shape legend: b batch, n seq_len, h num_heads, d head_dim, m rows (b * n * h), r rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import can_read
from .branches import BigBirdBlocks, BlockSparse, ExtraBranch, HashBuckets
from .custom_op import OPTIONS_SCHEMA, Options, attend, differentiate
from .kernels import choose_kernel
from .masked_tiles import TiledRows
from .seeded import hash_labels
from .tiled_softmax import TiledSoftmax
from .tiles import TilePlan, plan_blocks, plan_labels

__all__ = ["branched_attention"]


class Branches(NamedTuple):
    """What both custom ops take for the further branches, in the order of `_SCHEMA`.

    A query sees the keys of its own label, or the keys of the blocks that its block sees. Branches
    of a kind share a tensor, since lists of tensors are no plain arguments to autograd.
    """

    query_labels: Tensor | None  # (r, b, n, h), -1: takes no part
    key_labels: Tensor | None  # the same by query head
    num_labels: Sequence[int]  # (r,)
    block_masks: Tensor | None  # all masks, flattened and joined
    block_sizes: Sequence[int]  # (1 or h, blocks, tokens per block) of each mask, joined
    big_birds: Sequence[int]  # the numbers of each `BigBirdBlocks`, in their order, joined

    def plans(self, q: Tensor, k: Tensor, options: Options) -> Iterator[TilePlan]:
        """Plans one branch after the other."""
        num_kv_heads, is_causal = k.shape[2], options.is_causal
        groups, is_hidden = options.sequences(q)
        if self.query_labels is not None and self.key_labels is not None:
            for labels in zip(self.query_labels, self.key_labels, self.num_labels, strict=True):
                query_labels, key_labels, num_labels = _by_sequence(*labels, options)
                yield plan_labels(
                    query_labels,
                    key_labels,
                    num_labels=num_labels,
                    num_kv_heads=num_kv_heads,
                    is_causal=is_causal,
                )
        for block_size, pairs_of in self._block_rules():
            for group in groups:
                yield plan_blocks(
                    pairs_of(-(-group.length // block_size)).to(q.device),
                    block_size,
                    group,
                    shape=(*q.shape[:3], num_kv_heads),
                    is_causal=is_causal,
                    is_hidden=is_hidden,
                )

    def _block_rules(self) -> Iterator[tuple[int, Callable[[int], Tensor]]]:
        """The block size of each rule, and what lists the pairs of so many blocks."""
        start = 0
        for num_masks, num_blocks, block_size in _chunked(self.block_sizes, 3):
            assert self.block_masks is not None
            mask = self.block_masks[start : start + num_masks * num_blocks**2]
            start += mask.numel()
            mask = mask.view(*(num_masks,) * (num_masks > 1), num_blocks, num_blocks)
            yield block_size, partial(_pairs_of_mask, mask)
        for numbers in _chunked(self.big_birds, len(_BIG_BIRD)):
            options: dict[str, Any] = dict(zip(_BIG_BIRD, numbers, strict=True))
            rule = BigBirdBlocks(**options)
            yield rule.block_size, rule.block_pairs


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? query_labels, Tensor? key_labels, int[] num_labels, "
    f"Tensor? block_masks, SymInt[] block_sizes, SymInt[] big_birds, {OPTIONS_SCHEMA}"
)
_BIG_BIRD = ("block_size", "num_window", "num_global", "num_random", "seed")


def branched_attention(
    q: Tensor, k: Tensor, v: Tensor, extra_branches: Sequence[ExtraBranch], options: Options
) -> tuple[Tensor, Tensor]:
    """Attends by further branches and, if `options` has one, a dilated pattern: (out, lse)."""
    masks: list[Tensor] = []
    labels: list[tuple[Tensor, Tensor]] = []
    num_labels, block_sizes, big_birds = [], [], []
    for branch in extra_branches:
        if isinstance(branch, BigBirdBlocks):
            # Its pairs are listed inside of the op: how many there are, no compiler can know.
            big_birds += [getattr(branch, name) for name in _BIG_BIRD]
        elif isinstance(branch, BlockSparse):
            mask = branch.block_mask
            masks.append(mask.flatten())
            block_sizes += [mask.shape[0] if mask.ndim == 3 else 1, mask.shape[-1]]
            block_sizes.append(branch.block_size)
        elif isinstance(branch, HashBuckets):
            labels.append(_hashes(branch, q, k))
            num_labels += [branch.num_buckets] * branch.num_rounds
        else:
            labels.append((_kept(branch.queries, q), _kept(branch.keys, q)))
            num_labels.append(1)
    query_labels, key_labels = zip(*labels, strict=True) if labels else ((), ())
    branches = Branches(
        query_labels=torch.cat(query_labels) if labels else None,
        key_labels=torch.cat(key_labels) if labels else None,
        num_labels=num_labels,
        block_masks=torch.cat(masks) if masks else None,
        block_sizes=block_sizes,
        big_birds=big_birds,
    )
    out, lse = torch.ops.longnet_zoo.branched_attention(q, k, v, *branches, *options)
    return out, lse


def _pairs_of_mask(mask: Tensor, num_blocks: int) -> Tensor:
    """Numbers of (head,) query and key blocks that a mask (h, blocks, blocks) shows, as rows."""
    return mask[..., :num_blocks, :num_blocks].nonzero().T


def _chunked(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _hashes(branch: HashBuckets, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Hashes of queries and of keys by query head, (r, b, n, h)."""
    queries, keys = (
        hash_labels(
            x,
            num_kv_heads=k.shape[2],
            num_buckets=branch.num_buckets,
            num_rounds=branch.num_rounds,
            seed=branch.seed,
        )
        for x in (q, k)
    )
    return queries, keys.repeat_interleave(q.shape[2] // k.shape[2], dim=3)


def _kept(mask: Tensor | None, q: Tensor) -> Tensor:
    """Label 0 where the mask is True, -1 elsewhere, (1, b, n, h)."""
    if mask is None:
        return torch.zeros((1, *q.shape[:3]), dtype=torch.int32, device=q.device)
    return mask.int()[None] - 1


def _by_sequence(
    query_labels: Tensor, key_labels: Tensor, num_labels: int, options: Options
) -> tuple[Tensor, Tensor, int]:
    """Gives packed sequences labels of their own, and padding none."""
    mask, cu_seqlens = options.key_padding_mask, options.cu_seqlens
    if mask is not None:
        query_labels = query_labels.masked_fill(mask.unsqueeze(-1), -1)
        key_labels = key_labels.masked_fill(mask.unsqueeze(-1), -1)
    if cu_seqlens is not None:
        order = torch.arange(query_labels.shape[1], device=cu_seqlens.device)
        number = torch.searchsorted(cu_seqlens, order, right=True)[None, :, None] - 1
        query_labels, key_labels = (
            torch.where(labels < 0, -1, number * num_labels + labels)
            for labels in (query_labels, key_labels)
        )
        num_labels *= len(cu_seqlens) - 1
    return query_labels, key_labels, num_labels


def _split(arguments: tuple[Any, ...]) -> tuple[Branches, Options]:
    count = len(Branches._fields)
    return Branches(*arguments[:count]), Options(*arguments[count:])


def _softmaxes(
    q: Tensor, k: Tensor, branches: Branches, options: Options, *, has_lse_grad: bool | None = None
) -> Iterator[TiledSoftmax]:
    """What runs each branch, in the forward (`has_lse_grad` None) or the backward pass."""
    call = options.call(
        q,
        has_hidden_keys=False,
        is_backward=has_lse_grad is not None,
        has_lse_grad=bool(has_lse_grad),
    )
    kernel = choose_kernel(options.backend, replace(call, is_block=True))
    for plan in branches.plans(q, k, options):
        yield TiledSoftmax(plan=plan, kernel=kernel, scale=options.scale)


def _rows(x: Tensor) -> Tensor:
    """Rows (m, d) of a tensor (b, n, h, d)."""
    return x.reshape(-1, x.shape[-1])


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    branches, options = _split(arguments)
    if not can_read(q):
        raise NotImplementedError(
            "extra_branches decide what is computed as they run, so they cannot be part of a CUDA "
            "graph, got some while one is captured. Run without a graph."
        )
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    num_rows = q[..., 0].numel()
    out = q.new_zeros((num_rows + 1, q.shape[3]), dtype=sum_dtype)
    lse = out.new_full((num_rows + 1,), float("-inf"))
    if options.segment_lengths:
        dilated_out, dilated_lse = attend(q, k, v, *options)
        out[:-1], lse[:-1] = _rows(dilated_out), dilated_lse.flatten()
    rows = [_rows(x) for x in (q, k, v)]
    with torch.autocast(q.device.type, enabled=False):
        for softmax in _softmaxes(q, k, branches, options):
            softmax.merge_into(out, lse, *rows)
    return out[:-1].view(q.shape).to(q.dtype), lse[:-1].view(q.shape[:3])


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward(
    out_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, *arguments = others
    branches, options = _split(tuple(arguments))
    sums = tuple(lse.new_zeros((x[..., 0].numel() + 1, x.shape[3])) for x in (q, k, v))
    if options.segment_lengths:
        found = differentiate(out_grad, lse_grad, q, k, v, out, lse, *options)
        for total, grad in zip(sums, found[:3], strict=True):
            total[:-1] = _rows(grad)
    rows = TiledRows(
        out_grad=_rows(out_grad),
        q=_rows(q),
        k=_rows(k),
        v=_rows(v),
        out=_rows(out),
        lse=lse.flatten(),
        lse_grad=None if lse_grad is None else lse_grad.flatten(),
    )
    with torch.autocast(q.device.type, enabled=False):
        for softmax in _softmaxes(q, k, branches, options, has_lse_grad=lse_grad is not None):
            softmax.add_gradients(sums, rows)
    q_grad, k_grad, v_grad = (
        total[:-1].view(x.shape).to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True)
    )
    return q_grad, k_grad, v_grad


def _fake_backward(
    out_grad: Tensor, lse_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # Among the arguments there are tensors, and what is not.
    is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.others = [None if held else x for x, held in zip(inputs, is_tensor, strict=True)]
    ctx.save_for_backward(*output, *(x for x, held in zip(inputs, is_tensor, strict=True) if held))
    ctx.is_tensor = is_tensor
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, out_grad: Tensor | None, lse_grad: Tensor | None) -> Any:
    out, lse, *tensors = ctx.saved_tensors
    rest = iter(tensors)
    inputs = [next(rest) if held else x for x, held in zip(ctx.others, ctx.is_tensor, strict=True)]
    _, options = _split(tuple(inputs[3:]))
    grads = torch.ops.longnet_zoo.branched_attention_backward(
        torch.zeros_like(out) if out_grad is None else out_grad,
        lse_grad if options.return_lse else None,
        *inputs[:3],
        out,
        lse,
        *inputs[3:],
    )
    return *grads, *(None,) * (len(inputs) - 3)


_custom_op = torch.library.custom_op(
    "longnet_zoo::branched_attention",
    _forward,
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor)",
)
_custom_op.register_fake(_fake_forward)
_custom_op.register_autograd(_chain, setup_context=_save)
_custom_backward = torch.library.custom_op(
    "longnet_zoo::branched_attention_backward",
    _backward,
    mutates_args=(),
    schema=(
        "(Tensor out_grad, Tensor? lse_grad, "
        + _SCHEMA.replace("Tensor v, ", "Tensor v, Tensor out, Tensor lse, ")
        + ") -> (Tensor, Tensor, Tensor)"
    ),
)
_custom_backward.register_fake(_fake_backward)
