"""Contrastive losses against loops over all pairs."""

import math

import pytest
import torch
from torch.nn import functional

from longnet_zoo.ops.contrastive import contrastive_loss, sum_of_rows

from .largest_tensor import LargestTensor

PAIRS, CHANNELS = 11, 5
# Two captions of one image, three equal texts; numbers need not be small or in order.
LABELS = torch.tensor([7, 1, 900, 7, 3, 4, -2, 4, 4, 10, 11])


def draw(kind, dtype=torch.float64):
    """Leaves: features of length about 1, scale and for "sigmoid" bias."""
    image, text = functional.normalize(torch.randn(2, PAIRS, CHANNELS, dtype=dtype), dim=-1)
    scale = torch.tensor(6.0, dtype=dtype)
    leaves = [image, text, scale, *([torch.tensor(-1.5, dtype=dtype)] if kind == "sigmoid" else [])]
    return [leaf.clone().requires_grad_() for leaf in leaves]


def loss_of(leaves, kind, **options):
    bias = leaves[3] if kind == "sigmoid" else None
    return contrastive_loss(*leaves[:3], bias=bias, kind=kind, **options)


def plain_loss(leaves, kind, labels):
    """By the definition, one pair at a time."""
    image, text, scale, bias = (*leaves, 0.0)[:4]
    logits = [[scale * (i @ t) + bias for t in text] for i in image]
    is_pair = [[bool(a == b) for b in labels] for a in labels]
    places = range(len(image))
    total = 0.0
    for i in places:
        if kind == "sigmoid":
            for j in places:
                sign = 1 if is_pair[i][j] else -1
                total = total - torch.sigmoid(sign * logits[i][j]).log()
            continue
        for row in (logits[i], [logits[j][i] for j in places]):
            norm = sum(logit.exp() for logit in row)
            pairs = [j for j in places if is_pair[i][j]]
            total = total - sum((row[j].exp() / norm).log() for j in pairs) / len(pairs) / 2
    return total / len(image)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["identity", "labels"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
def test_value_and_gradients_are_those_of_the_definition(kind, labels, chunk_size):
    leaves = draw(kind)
    loss = loss_of(leaves, kind, labels=labels, chunk_size=chunk_size)
    expected = plain_loss(leaves, kind, torch.arange(PAIRS) if labels is None else labels)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn((), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradcheck(kind):
    leaves = draw(kind)
    assert torch.autograd.gradcheck(
        lambda *x: loss_of(x, kind, labels=LABELS, chunk_size=3), leaves
    )


def test_softmax_is_the_cross_entropy_of_both_directions():
    image, text, scale = draw("softmax")
    logits, pairs = scale * image @ text.T, torch.arange(PAIRS)
    expected = functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)
    torch.testing.assert_close(contrastive_loss(image, text, scale), expected / 2)
    torch.testing.assert_close(contrastive_loss(image, text, 6.0), expected / 2)


def test_sigmoid_of_nothing_in_common():
    image = torch.eye(4)
    loss = contrastive_loss(image, image.roll(1, 0), 10.0, bias=-10.0, kind="sigmoid")
    # Each row has a pair of cosine 0, another of cosine 1, and two of cosine 0.
    expected = math.log1p(math.exp(10)) + math.log(2) + 2 * math.log1p(math.exp(-10))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("has_labels", [False, True])
def test_captions_of_one_image_do_not_compete(kind, has_labels):
    """An image that occurs twice, with two captions: both rows are pulled to both captions."""
    image, text, *rest = draw(kind)
    image.data[1] = image.data[0]
    labels = torch.tensor([0, *range(PAIRS - 1)]) if has_labels else None
    loss_of([image, text, *rest], kind, labels=labels).backward()
    assert torch.allclose(image.grad[0], image.grad[1], rtol=1e-9) == has_labels


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_half_features_are_compared_in_float32(kind, dtype, is_autocast):
    leaves = draw(kind, torch.float32)
    leaves[:2] = [x.detach().to(dtype).requires_grad_() for x in leaves[:2]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    if is_autocast:
        leaves[:2] = [x.detach().float().requires_grad_() for x in leaves[:2]]
    with torch.autocast("cpu", dtype, enabled=is_autocast):
        loss = loss_of(leaves, kind, chunk_size=4)
    expected = loss_of(exact, kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True
    ):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6 + eps * 0.1, rtol=2 * eps)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_logits_of_all_pairs_never_exist_with_chunks(kind):
    image, text, *rest = draw(kind)
    image, text = (x.repeat(10, 1).detach().requires_grad_() for x in (image, text))
    numel = {}
    for chunk_size in (None, 7):
        with LargestTensor() as largest:
            loss_of([image, text, *rest], kind, chunk_size=chunk_size).backward()
        numel[chunk_size] = largest.numel
    assert numel == {None: (10 * PAIRS) ** 2, 7: 7 * 10 * PAIRS}


def test_chunks_are_freed_before_the_backward_pass():
    """What is kept for it is features, not logits."""
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    leaves = [x.repeat(10, 1).detach().requires_grad_() for x in draw("softmax")[:2]]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        contrastive_loss(*leaves, 6.0, chunk_size=7)
    assert max(kept) < 7 * 10 * PAIRS


def test_large_logits_stay_finite():
    for kind in ("softmax", "sigmoid"):
        image, text, *_ = leaves = draw(kind, torch.float32)
        bias = None if kind == "softmax" else 0.0
        loss = contrastive_loss(image, text, 1e4, bias=bias, kind=kind)
        grads = torch.autograd.grad(loss, leaves[:2])
        assert all(x.isfinite().all() for x in (loss, *grads))


def test_no_rows_cost_nothing():
    image, text, scale = draw("softmax")
    labels = torch.arange(PAIRS)
    total = sum_of_rows(
        image[:0], text, labels[:0], labels, scale=scale, bias=None, kind="softmax", chunk_size=None
    )
    assert total == 0
    assert all((x == 0).all() for x in torch.autograd.grad(total, [image, text, scale]))


def test_compiled_equals_eager():
    leaves = draw("sigmoid", torch.float32)
    compiled = torch.compile(
        lambda *x: loss_of(x, "sigmoid", labels=LABELS), backend="aot_eager", fullgraph=True
    )
    loss, expected = compiled(*leaves), loss_of(leaves, "sigmoid", labels=LABELS)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_bad_input_is_refused():
    image, text, scale, bias = draw("sigmoid")
    with pytest.raises(ValueError, match=r"kind must be one of .*'sigmoid'.*, got 'hinge'"):
        contrastive_loss(image, text, scale, kind="hinge")
    with pytest.raises(ValueError, match=r"bias is needed .*, got None with kind='sigmoid'"):
        contrastive_loss(image, text, scale, kind="sigmoid")
    with pytest.raises(ValueError, match=r"no effect on 'softmax', got one with kind='softmax'"):
        contrastive_loss(image, text, scale, bias=bias)
    for one, other in ((image, text[:-1]), (image[0], text[0]), (image[:0], text[:0])):
        with pytest.raises(ValueError, match=r"\(batch, channels\).*got \((11|5|0),.* and \("):
            contrastive_loss(one, other, scale)
    with pytest.raises(ValueError, match=r"for each pair, \(11,\), got \(10,\)"):
        contrastive_loss(image, text, scale, labels=LABELS[:-1])
    with pytest.raises(TypeError, match=r"a tensor of int64, got torch.int32"):
        contrastive_loss(image, text, scale, labels=LABELS.int())
    with pytest.raises(TypeError, match=r"labels must be a tensor of int64, got list"):
        contrastive_loss(image, text, scale, labels=LABELS.tolist())
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1 or None, got 0"):
        contrastive_loss(image, text, scale, chunk_size=0)
