import pytest
import torch

from recipes.classification_metrics import UNLABELLED
from recipes.tagging_metrics import TaggingMetrics, tag_scores


def made():
    draw = torch.Generator().manual_seed(0)
    tags = (torch.rand(2, 13, 3, generator=draw) < 0.3).long()
    logits = torch.randn(2, 13, 3, generator=draw) + 2 * tags
    tags[1, 9:] = UNLABELLED
    tags[..., 2] = tags[..., 2].clamp(max=0)  # never heard
    return logits, tags


def average_precision(probabilities, tags):
    """Mean over the frames in which it is heard of the precision at their probability."""
    order = probabilities.argsort(descending=True)
    hits = tags[order].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def test_figures_are_those_of_the_formulas():
    logits, tags = made()
    metrics = TaggingMetrics(3)
    metrics.update(logits[:1], tags[:1])
    metrics.update(logits[1:], tags[1:])
    figures, scores = metrics.compute()
    known = tags[..., 0] != UNLABELLED
    x, y = logits[known], tags[known]
    heard = x > 0
    f1 = [
        2 * float((heard & (y == 1))[:, i].sum()) / float(heard[:, i].sum() + y[:, i].sum())
        for i in range(2)
    ]
    assert figures["f1"] == pytest.approx(sum(f1) / 2)
    expected = [average_precision(x[:, i].sigmoid(), y[:, i]) for i in range(2)]
    # Of 1,000 bins.
    assert figures["map"] == pytest.approx(sum(expected) / 2, abs=0.005)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x, y.float())
    assert figures["loss"] == pytest.approx(float(loss), rel=1e-5)
    rows = tag_scores(scores, ("a", "b", "c"))
    assert rows["a"]["frames"] == int(y[:, 0].sum())
    assert rows["b"]["f1"] == pytest.approx(f1[1])
    assert rows["c"] == {"frames": 0, "f1": None, "ap": None}


def test_nothing_known_gives_no_figures():
    metrics = TaggingMetrics(2)
    metrics.update(torch.zeros(1, 3, 2), torch.full((1, 3, 2), UNLABELLED))
    assert metrics.compute()[0] == {}
    logits, tags = made()
    metrics.update(logits[..., :2], tags[..., :2])
    assert metrics.compute()[0]
    metrics.reset()
    metrics.update(torch.zeros(1, 3, 2), torch.full((1, 3, 2), UNLABELLED))
    assert metrics.compute()[0] == {}
