"""Cases of test_contrastive.py, run by every rank."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from longnet_zoo.ops.contrastive import contrastive_loss
from longnet_zoo.parallel import ParallelContrastiveLoss
from tests.models.small_clip import draw, make

CHANNELS = 5
EXACT = {"atol": 1e-6, "rtol": 1e-6}


def counts_of(*, is_even: bool) -> list[int]:
    """Pairs of each rank."""
    return [3 if is_even else 2 + rank for rank in range(dist.get_world_size())]


def mine(x, counts):
    return x.split(counts)[dist.get_rank()]


def mean_over_ranks(x):
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def labels_of(num_pairs):
    """Equal ones within a rank and across ranks."""
    return torch.arange(num_pairs).square() % 4


def of_features(kind, *, is_even=False, has_labels=False, chunk_size=None, dtype=torch.float64):
    """Value, and the gradients of features, scale and bias, against a random cotangent."""
    counts = counts_of(is_even=is_even)
    image, text = functional.normalize(torch.randn(2, sum(counts), CHANNELS).to(dtype), dim=-1)
    scale, bias, cotangent = torch.tensor([6.0, -1.5, torch.randn(())], dtype=dtype).unbind()
    whole = [x.clone().requires_grad_() for x in (image, text, scale, bias)]
    labels = labels_of(sum(counts)) if has_labels else None
    options = {"kind": kind, "chunk_size": chunk_size}

    def loss_of(op, image, text, scale, bias, labels):
        bias = bias if kind == "sigmoid" else None
        return op(image, text, scale, bias=bias, labels=labels, **options)

    expected = loss_of(contrastive_loss, *whole, labels)
    used = whole if kind == "sigmoid" else whole[:3]
    expected_grads = torch.autograd.grad(expected, used, cotangent)

    parts = [mine(x, counts).detach().requires_grad_() for x in whole[:2]]
    parts += [x.detach().clone().requires_grad_() for x in whole[2:]]
    op = ParallelContrastiveLoss(dist.group.WORLD)
    found = loss_of(op, *parts, mine(labels, counts) if has_labels else None)
    torch.testing.assert_close(found, expected, **EXACT)
    grads = torch.autograd.grad(found, parts[: len(used)], cotangent)
    for ours, theirs in zip(grads[:2], expected_grads[:2], strict=True):
        # The mean over ranks divides what reaches the parameters through the features.
        torch.testing.assert_close(ours / dist.get_world_size(), mine(theirs, counts), **EXACT)
    for ours, theirs in zip(grads[2:], expected_grads[2:], strict=True):
        torch.testing.assert_close(mean_over_ranks(ours), theirs, **EXACT)


def of_a_model(loss, *, chunk_size=None):
    """Every parameter of two towers, averaged as data parallelism does."""
    model, counts = make(loss=loss).double(), counts_of(is_even=False)
    image, tokens = draw(sum(counts))
    image, labels = image.double(), labels_of(sum(counts))
    expected = model.contrastive_loss(image, tokens, labels=labels)
    expected_grads = torch.autograd.grad(expected, tuple(model.parameters()))
    model.contrastive_loss_op = ParallelContrastiveLoss(dist.group.WORLD)
    # Copies have it, too.
    found = copy.deepcopy(model).contrastive_loss(
        *(mine(x, counts) for x in (image, tokens)), labels=mine(labels, counts)
    )
    torch.testing.assert_close(found, expected, **EXACT)
    found = model.contrastive_loss(
        *(mine(x, counts) for x in (image, tokens)),
        labels=mine(labels, counts),
        chunk_size=chunk_size,
    )
    grads = torch.autograd.grad(found, tuple(model.parameters()))
    for (name, _), ours, theirs in zip(
        model.named_parameters(), grads, expected_grads, strict=True
    ):
        torch.testing.assert_close(
            mean_over_ranks(ours), theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )


def in_a_part_of_the_processes():
    """Groups of one process each: every rank has the loss of its own pairs."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    torch.manual_seed(dist.get_rank())
    image, text = torch.randn(2, 2 + dist.get_rank(), CHANNELS)
    found = ParallelContrastiveLoss(groups[dist.get_rank()])(image, text, 3.0)
    torch.testing.assert_close(found, contrastive_loss(image, text, 3.0))
    assert found.dtype == torch.float32


def half_features_travel_as_such():
    counts = counts_of(is_even=False)
    image, text = torch.randn(2, sum(counts), CHANNELS).bfloat16()
    part = mine(image, counts).clone().requires_grad_()
    found = ParallelContrastiveLoss(dist.group.WORLD)(part, mine(text, counts), 3.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, contrastive_loss(image, text, 3.0))
    found.backward()
    assert part.grad.dtype == torch.bfloat16


def what_does_not_fit_is_refused_everywhere():
    op, rank = ParallelContrastiveLoss(dist.group.WORLD), dist.get_rank()
    features = torch.randn(2, 5 if rank else 7)
    with pytest.raises(ValueError, match=r"got the channels \[7, 5.* and labels on 0 of \d"):
        op(features, features, 1.0)
    features = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"got the channels \[5, 5.* and labels on 1 of \d"):
        op(features, features, 1.0, labels=None if rank else torch.arange(2))
    with pytest.raises(ValueError, match=r"bias is needed for kind='sigmoid'"):
        op(features, features, 1.0, kind="sigmoid")


KINDS = ("softmax", "sigmoid")
CASES = {
    **{f"{kind}_even": partial(of_features, kind, is_even=True) for kind in KINDS},
    **{f"{kind}_uneven": partial(of_features, kind) for kind in KINDS},
    **{f"{kind}_labels": partial(of_features, kind, has_labels=True) for kind in KINDS},
    **{f"{kind}_chunks": partial(of_features, kind, chunk_size=2) for kind in KINDS},
    **{f"{kind}_float32": partial(of_features, kind, dtype=torch.float32) for kind in KINDS},
    **{f"{kind}_model": partial(of_a_model, kind) for kind in KINDS},
    "model_chunks": partial(of_a_model, "softmax", chunk_size=2),
    "in_a_part_of_the_processes": in_a_part_of_the_processes,
    "half_features_travel_as_such": half_features_travel_as_such,
    "what_does_not_fit_is_refused_everywhere": what_does_not_fit_is_refused_everywhere,
}
