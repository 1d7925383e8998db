"""Counting what is right, and how sure that is."""

import numpy as np
import pytest
import torch

import longnet_zoo as lz
from longnet_zoo.long_range import (
    IGNORE_INDEX,
    Example,
    Passkey,
    Score,
    SelectiveCopying,
    answer_logits,
    binomial_interval,
    draw_examples,
    majority,
    score_batch,
    score_model,
)

OPTIONS = {"embed_dim": 16, "num_layers": 1, "num_heads": 2}


def make_model(task):
    model = lz.create_model("longnet_lm_tiny", vocab_size=task.vocab_size, **OPTIONS)
    return model.eval()


def test_score_counts_answers_and_whole_examples():
    task = SelectiveCopying(seq_len=20, num_data_tokens=2, vocab_size=5)
    model = make_model(task)
    examples = draw_examples(task, 40)
    score = score_model(model, task, examples)
    right, wholes, nats = 0, 0, 0.0
    for example in examples:
        batch = {"tokens": example.tokens[None], "labels": example.labels[None]}
        batch = {name: torch.from_numpy(rows) for name, rows in batch.items()}
        with torch.no_grad():
            logits, classes = answer_logits(model, task, batch)
        is_right = logits.argmax(-1) == classes
        right, wholes = right + int(is_right.sum()), wholes + bool(is_right.all())
        nats -= float(logits.log_softmax(-1).gather(1, classes[:, None]).sum())
    assert 0 < wholes < right < 80
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert (score.num_examples, score.num_labels) == (40, 80)
    assert (score.num_right_examples, score.num_right_labels) == (wholes, right)
    assert score.counts(task) == (right, 80)
    assert score.accuracy(task) == right / 80
    assert score.counts(Passkey()) == (wholes, 40)


def test_rows_without_labels_do_not_count():
    task = SelectiveCopying(seq_len=20, num_data_tokens=2, vocab_size=5)
    model, batch = make_model(task), task.batch(range(3), split="val")
    batch["labels"][1] = IGNORE_INDEX
    score = score_batch(model, task, batch)
    assert (score.num_examples, score.num_labels) == (2, 4)
    assert Score() + score == score


def test_scores_add_up():
    one = Score(num_examples=2, num_right_examples=1, num_labels=4, num_right_labels=3, nats=1.5)
    total = one + one
    assert (total.num_examples, total.num_right_labels, total.nats) == (4, 6, 3.0)


def test_majority_is_the_share_of_the_most_frequent_answer():
    labels = [[1, 2], [1, 3], [1, 2]]
    examples = [Example(np.zeros(2, int), np.array(row)) for row in labels]
    assert majority(SelectiveCopying(), examples) == 3 / 6
    # A whole answer is (1, 2) in two of three.
    assert majority(Passkey(), examples) == 2 / 3


def test_interval_is_wilsons():
    # The standard example: 2 of 10 gives 5.7 % to 51.0 %.
    assert binomial_interval(2, 10) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert binomial_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert binomial_interval(10, 10)[1] == 1.0


def test_nothing_is_scored_in_training_mode_or_without_examples():
    task = SelectiveCopying(seq_len=20, num_data_tokens=2)
    with pytest.raises(ValueError, match="evaluation mode, got one in training"):
        score_model(make_model(task).train(), task, draw_examples(task, 1))
    with pytest.raises(ValueError, match="at least one example, got none"):
        score_model(make_model(task), task, [])
