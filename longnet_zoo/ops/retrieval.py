"""Retrieval: how high the right candidates of a query rank among all candidates.

Shape legend: m queries, n candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["positive_ranks", "recall_at", "retrieval_metrics"]


def positive_ranks(similarity: Tensor, positives: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Finds the rank of the best right candidate of each query, from 1.

    1 + the number of wrong candidates that are not less similar than the most similar right one:
    ties count against the model, and so does NaN, so that a collapsed model has no recall.

    Args:
        similarity: Floating, (queries, candidates); larger is more similar.
        positives: Which candidates are right, bool (queries, candidates), at least one each.
        chunk_size: Queries that are compared at once.

    Returns:
        Ranks, int64 (queries,).

    Raises:
        ValueError: If shapes do not fit, `chunk_size` is below 1 or a query has no right candidate.
        TypeError: If dtypes do not fit.

    Example:
        >>> ranks = positive_ranks(image_features @ text_features.T, torch.eye(100).bool())
    """
    _check(similarity, positives, chunk_size)
    return torch.cat(
        [
            _ranks(rows, right)
            for rows, right in zip(
                similarity.split(chunk_size), positives.split(chunk_size), strict=True
            )
        ]
    )


def recall_at(
    similarity: Tensor,
    positives: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk_size: int = 1024,
) -> dict[int, float]:
    """Computes the share of queries with a right candidate among the k most similar ones.

    Rows are queries; for the other direction pass both arguments transposed.

    Args:
        similarity: As for `positive_ranks`, like what follows.
        positives: Which candidates are right.
        ks: The numbers of candidates to look at, each at least 1.
        chunk_size: Queries that are compared at once.

    Returns:
        The share of each k, in [0, 1].

    Raises:
        ValueError: If one of `ks` is below 1, or as for `positive_ranks`.
        TypeError: As for `positive_ranks`.
    """
    return _shares(positive_ranks(similarity, positives, chunk_size=chunk_size), ks)


def retrieval_metrics(
    similarity: Tensor,
    positives: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Computes recall and median rank of images (rows) and texts (columns), both directions.

    Args:
        similarity: Floating, (images, texts).
        positives: Which of them belong together, bool (images, texts).
        ks: As for `recall_at`.
        chunk_size: As for `recall_at`.

    Returns:
        `"image_to_text/recall@5"` and the like for each k, `"image_to_text/median_rank"`, and the
        same for `"text_to_image"`.

    Raises:
        ValueError: As for `recall_at`.
        TypeError: As for `recall_at`.
    """
    found: dict[str, float] = {}
    for name, rows, right in (
        ("image_to_text", similarity, positives),
        ("text_to_image", similarity.T, positives.T),
    ):
        ranks = positive_ranks(rows, right, chunk_size=chunk_size).sort().values
        found |= {f"{name}/recall@{k}": share for k, share in _shares(ranks, ks).items()}
        middle = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]).item() / 2
        found[f"{name}/median_rank"] = middle
    return found


def _ranks(similarity: Tensor, positives: Tensor) -> Tensor:
    best = similarity.masked_fill(~positives, float("-inf")).amax(dim=1, keepdim=True)
    ahead = ~(similarity < best) & ~positives
    return 1 + ahead.sum(dim=1)


def _shares(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    if min(ks, default=0) < 1:
        raise ValueError(f"ks must be numbers of at least 1, got {tuple(ks)}.")
    return {k: (ranks <= k).double().mean().item() for k in ks}


def _check(similarity: Tensor, positives: Tensor, chunk_size: int) -> None:
    if not similarity.is_floating_point() or positives.dtype != torch.bool:
        raise TypeError(
            "similarity must be floating and positives bool, got "
            f"{similarity.dtype} and {positives.dtype}."
        )
    if similarity.ndim != 2 or 0 in similarity.shape or similarity.shape != positives.shape:
        raise ValueError(
            "similarity and positives must both be (queries, candidates), at least one of each, "
            f"got {tuple(similarity.shape)} and {tuple(positives.shape)}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    lacking = (~positives.any(dim=1)).nonzero().flatten().tolist()
    if lacking:
        raise ValueError(
            f"each query must have a right candidate, got none in {len(lacking)} of "
            f"{len(positives)} rows, the first is row {lacking[0]}. Leave such rows out."
        )
