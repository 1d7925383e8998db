"""Figures of captions, counted by hand, and the model of text alone."""

import math

import pytest
import torch
from torch.nn import functional

from recipes.captioning_scores import CaptionScores, TextOnlyModel

GROUPS = {"colour": frozenset({"red", "blue"}), "style": frozenset({"bold"})}


def test_losses_are_summed_over_tokens_that_count():
    token_bytes = torch.tensor([1, 2, 0])
    logits = torch.randn(2, 3, 3)
    labels = torch.tensor([[0, 1, -100], [2, -100, -100]])
    scores = CaptionScores(token_bytes=token_bytes)
    for row in range(2):
        scores.add_logits(logits[row : row + 1], labels[row : row + 1])
    figures = scores.figures()
    expected = functional.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="sum")
    assert figures["loss"] == pytest.approx(float(expected) / 3)
    assert figures["bits_per_byte"] == pytest.approx(float(expected) / math.log(2) / 3)
    right = (logits.argmax(-1) == labels).sum().item()
    assert figures["token_accuracy"] == pytest.approx(right / 3)
    assert set(figures) == {"loss", "bits_per_byte", "token_accuracy"}


def test_texts_are_compared_word_by_word():
    scores = CaptionScores(token_bytes=torch.ones(3), word_groups=GROUPS)
    true = ["red bell bold", "blue bell", "arrow arrow", "red arrow"]
    scores.add_texts(true[:2], ["red bell bold", "red bell bell"])
    scores.add_texts(true[2:], ["arrow bold", "arrow"])
    figures = scores.figures()
    assert figures["exact"] == 0.25
    # 3 + 1 + 1 + 1 in common, of 9 and 9 words.
    assert figures["word_f1"] == pytest.approx(2 * 6 / (9 + 9))
    assert figures["colour_accuracy"] == pytest.approx(1 / 3)
    assert figures["style_accuracy"] == 1.0
    assert scores.most_common() == {"colour": pytest.approx(2 / 3), "style": 1.0}


def test_nothing_has_no_figures():
    assert CaptionScores(token_bytes=torch.ones(3), word_groups=GROUPS).figures() == {}
    assert CaptionScores(token_bytes=torch.ones(3), word_groups=GROUPS).most_common() == {}


def test_processes_are_summed():
    class Twice:
        world_size, root_device = 2, "cpu"

        @staticmethod
        def reduce(sums, reduce_op):
            assert reduce_op == "sum"
            return sums + torch.tensor([0.0] * 4 + [1.0, 1.0] + [0.0] * 7).to(sums)

    scores = CaptionScores(token_bytes=torch.ones(3), word_groups=GROUPS)
    scores.add_texts(["red"], ["blue"])
    scores.reduce(Twice())
    assert scores.figures()["exact"] == 0.5


def test_text_model_mixes_contexts_as_witten_and_bell():
    model = TextOnlyModel(vocab_size=4, order=2)
    model.learn([[0, 1, 2], [0, 1, 1]])
    # Without context 1 was seen 3 times and 2 once: 4 tokens, 2 different ones.
    one, two = (3 + 2 / 4) / 6, (1 + 2 / 4) / 6
    # Behind 0 came 1 twice; behind 1 came 1 and 2.
    first, second = (2 + 1 * one) / 3, (1 + 2 * two) / 4
    assert model.nats([0, 1, 2]) == pytest.approx(-math.log(first * second))
    # Unseen tokens and contexts have a share of what is left.
    three = (2 / 4) / 6
    assert model.nats([3, 3]) == pytest.approx(-math.log(three))


def test_text_model_learns_from_text():
    texts = [[0, *map(ord, text), 0] for text in ("red bell", "blue bell", "red arrow") * 9]
    model = TextOnlyModel(vocab_size=128)
    before = model.nats(texts[0])
    model.learn(texts)
    assert model.nats(texts[0]) < 0.1 * before
    # A whole distribution: the probabilities of all next tokens add up to one.
    total = sum(math.exp(model.nats([*texts[0][:3], i]) * -1) for i in range(128))
    assert total == pytest.approx(math.exp(-model.nats(texts[0][:3])))
