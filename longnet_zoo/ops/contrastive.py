"""Contrastive losses of pairs of images and texts, without the logits of all pairs at once.

    logits_ij = scale * image_i . text_j + bias,    z_ij = 1 for a pair (equal labels), else -1

    softmax (arXiv 2103.00020): the mean over all images i, and likewise over all texts, halved, of
        -(mean of log softmax_j(logits_ij) over the pairs j of i)
    sigmoid (arXiv 2303.15343): -1 / b * sum_ij log sigmoid(z_ij * logits_ij)

Shape legend: b pairs of this call, n pairs to compare with, d channels.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["ContrastiveKind", "check_pairs", "contrastive_loss", "sum_of_rows"]

ContrastiveKind = Literal["softmax", "sigmoid"]


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor | float,
    *,
    bias: Tensor | float | None = None,
    kind: ContrastiveKind = "softmax",
    labels: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Computes the contrastive loss of a batch in which row i of both features is a pair.

    An image or text that occurs twice must not count as its own opposite: give such rows equal
    `labels`, and all rows with equal labels are pairs. For "softmax" the target is then spread
    evenly over the pairs of a row. Everything is computed in at least float32, under autocast too.

    Args:
        image_features: Features of length 1, (batch, channels).
        text_features: Features of length 1, (batch, channels).
        scale: What cosines are multiplied with, a number above 0; not its logarithm.
        bias: Added to every logit; needed for "sigmoid", and without effect on "softmax", which
            refuses it.
        kind: "softmax" or "sigmoid".
        labels: Which rows belong together, int64 (batch,); None: each only to itself.
        chunk_size: Rows whose logits exist at once, computed again in the backward pass; None: all.

    Returns:
        The loss in nats, a scalar of at least float32.

    Raises:
        ValueError: If shapes do not fit, or an option is outside its range.
        TypeError: If labels are not int64.

    Example:
        >>> image, text = functional.normalize(torch.randn(2, 8, 64), dim=-1)
        >>> loss = contrastive_loss(image, text, 1 / 0.07)
    """
    check_pairs(image_features, text_features, bias, kind, labels, chunk_size)
    if labels is None:
        labels = torch.arange(len(image_features), device=image_features.device)
    rows = partial(sum_of_rows, kind=kind, scale=scale, bias=bias, chunk_size=chunk_size)
    total = rows(image_features, text_features, labels, labels)
    if kind == "softmax":
        total = (total + rows(text_features, image_features, labels, labels)) / 2
    return total / len(image_features)


def sum_of_rows(
    queries: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    *,
    scale: Tensor | float,
    bias: Tensor | float | None,
    kind: ContrastiveKind,
    chunk_size: int | None,
) -> Tensor:
    """Sums the losses of some rows of the logits, in one direction.

    Args:
        queries: Features of the rows, (b, d).
        keys: Features of all columns, (n, d).
        query_labels: Labels of the rows, int64 (b,); each is among those of the columns.
        key_labels: Labels of the columns, int64 (n,).
        scale: As for `contrastive_loss`, like what follows.
        bias: Added to every logit.
        kind: "softmax" or "sigmoid".
        chunk_size: Rows whose logits exist at once.

    Returns:
        The sum, a scalar; 0 with zero gradients where there are no rows.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    columns = keys.to(dtype)
    row_losses = _softmax_rows if kind == "softmax" else _sigmoid_rows
    total = queries.new_zeros((), dtype=dtype)
    size = max(len(queries), 1) if chunk_size is None else chunk_size
    for rows, labels in zip(queries.split(size), query_labels.split(size), strict=True):
        inputs = (rows.to(dtype), columns, labels, key_labels, scale, bias)
        if chunk_size is None:
            part = row_losses(*inputs)
        else:
            part = checkpoint(row_losses, *inputs, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    return total


def _softmax_rows(
    rows: Tensor,
    columns: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None,
) -> Tensor:
    logits = _logits(rows, columns, scale, bias)
    is_pair = row_labels[:, None] == column_labels
    of_pairs = torch.where(is_pair, logits, 0.0).sum(dim=1) / is_pair.sum(dim=1)
    return (logits.logsumexp(dim=1) - of_pairs).sum()


def _sigmoid_rows(
    rows: Tensor,
    columns: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None,
) -> Tensor:
    logits = _logits(rows, columns, scale, bias)
    is_pair = row_labels[:, None] == column_labels
    return -functional.logsigmoid(torch.where(is_pair, logits, -logits)).sum()


def _logits(
    rows: Tensor, columns: Tensor, scale: Tensor | float, bias: Tensor | float | None
) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        logits = scale * (rows @ columns.T)
    return logits if bias is None else logits + bias


def check_pairs(
    image_features: Tensor,
    text_features: Tensor,
    bias: Tensor | float | None,
    kind: str,
    labels: Tensor | None,
    chunk_size: int | None,
) -> None:
    """Checks the arguments of `contrastive_loss`."""
    if kind not in get_args(ContrastiveKind):
        raise ValueError(f"kind must be one of {get_args(ContrastiveKind)}, got {kind!r}.")
    if (kind == "sigmoid") != (bias is not None):
        got = "None" if bias is None else "one"
        raise ValueError(
            f"bias is needed for kind='sigmoid' and has no effect on 'softmax', got {got} with "
            f"kind={kind!r}."
        )
    shape = tuple(image_features.shape)
    if len(shape) != 2 or 0 in shape or tuple(text_features.shape) != shape:
        raise ValueError(
            "image_features and text_features must both be (batch, channels) with at least one "
            f"pair, got {shape} and {tuple(text_features.shape)}."
        )
    if labels is not None and (not isinstance(labels, Tensor) or labels.dtype != torch.int64):
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of int64, got {got}. Convert with labels.long().")
    if labels is not None and tuple(labels.shape) != shape[:1]:
        raise ValueError(
            f"labels must have one number for each pair, {shape[:1]}, got {tuple(labels.shape)}."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
