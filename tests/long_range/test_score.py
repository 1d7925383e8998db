"""Counting what is right, and how sure that is."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional

import longnet_zoo as lz
from longnet_zoo.long_range import (
    IGNORE_INDEX,
    AssociativeRecall,
    Example,
    ListOps,
    Passkey,
    Score,
    SelectiveCopying,
    answer_logits,
    batch_accuracy,
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
    right, wholes, squares, nats = 0, 0, 0, 0.0
    for example in examples:
        batch = {"tokens": example.tokens[None], "labels": example.labels[None]}
        batch = {name: torch.from_numpy(rows) for name, rows in batch.items()}
        with torch.no_grad():
            logits, classes = answer_logits(model, task, batch)
        is_right = logits.argmax(-1) == classes
        right, wholes = right + int(is_right.sum()), wholes + bool(is_right.all())
        squares += int(is_right.sum()) ** 2
        nats -= float(logits.log_softmax(-1).gather(1, classes[:, None]).sum())
    assert 0 < wholes < right < 80
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert (score.num_examples, score.num_labels) == (40, 80)
    assert (score.num_right_examples, score.num_right_labels) == (wholes, right)
    assert score.right_squares == squares
    # However the examples are batched.
    assert score_model(model, task, examples, batch_size=3).right_squares == squares
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


@pytest.mark.parametrize("task", [SelectiveCopying(seq_len=20, num_data_tokens=2), Passkey()])
def test_a_training_batch_is_counted_as_the_task_counts(task):
    batch = task.batch(range(6), split="train")
    batch["labels"][2] = IGNORE_INDEX
    classes = batch["labels"][batch["labels"] != IGNORE_INDEX]
    # Every other answer is right, in the last rows all of them.
    is_right = torch.arange(len(classes)) % 2 == 0
    is_right[len(classes) // 2 :] = True
    logits = functional.one_hot(torch.where(is_right, classes, classes - 1), 259)
    accuracy = batch_accuracy(task, logits, classes, batch["labels"])
    if task.scores_whole:
        rows = is_right.split((batch["labels"] != IGNORE_INDEX).sum(1).tolist())
        shares = [bool(row.all()) for row in rows if len(row)]
        assert 0 < sum(shares) < 5
        assert float(accuracy) == pytest.approx(sum(shares) / 5)
    else:
        assert float(accuracy) == pytest.approx(float(is_right.float().mean()))


def test_scores_add_up():
    one = Score(num_examples=2, num_right_examples=1, num_labels=4, num_right_labels=3, nats=1.5)
    total = one + one
    assert (total.num_examples, total.num_right_labels, total.nats) == (4, 6, 3.0)


def answered(answers):
    """Returns an example for each of these answers."""
    return [Example(np.zeros(len(ids), int), np.array(ids)) for ids in answers]


def training_answers(task, **options):
    """Returns the answers of 200 training examples, the most frequent one first."""
    labels = (task.example(index, split="train", **options).labels for index in range(200))
    counts = Counter(tuple(x[x != IGNORE_INDEX].tolist()) for x in labels)
    return [ids for ids, _ in counts.most_common()]


def test_majority_is_the_answer_of_training_and_not_of_the_test():
    task = SelectiveCopying(seq_len=20, num_data_tokens=1)
    most, other, *_ = training_answers(task, seed=1)
    assert majority(task, answered([most, other, other]), seed=1) == 1 / 3


def test_majority_of_whole_answers_takes_them_whole():
    most, other, *_ = training_answers(Passkey(seq_len=320))
    assert len(most) > 1
    assert majority(Passkey(seq_len=320), answered([other, most, most[:-1], other])) == 1 / 4


def test_interval_is_wilsons():
    # The standard example: 2 of 10 gives 5.7 % to 51.0 %.
    assert binomial_interval(2, 10) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert binomial_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert binomial_interval(10, 10)[1] == 1.0


def make_score(right_of_each, num_labels):
    """Returns the score of examples with so many right answers of `num_labels` each."""
    number = len(right_of_each)
    return Score(
        num_examples=number,
        num_right_examples=right_of_each.count(num_labels),
        num_labels=number * num_labels,
        num_right_labels=sum(right_of_each),
        right_squares=sum(right**2 for right in right_of_each),
    )


def test_answers_that_are_right_together_count_as_one():
    task = AssociativeRecall(seq_len=64, num_pairs=8)
    together = make_score([8, 0, 0, 8, 0] * 20, 8)
    assert together.interval(task) == pytest.approx(binomial_interval(40, 100))
    # Four and four of the eight are right or wrong together, so there are two answers in each.
    halves = make_score([8, 4, 4, 0] * 25, 8)
    assert halves.interval(task) == pytest.approx(binomial_interval(100, 200))


def test_answers_that_are_alike_by_chance_count_each():
    task = AssociativeRecall(seq_len=64, num_pairs=8)
    rng = np.random.default_rng(0)
    counts = rng.binomial(8, 0.4, size=5000).tolist()
    low, high = make_score(counts, 8).interval(task)
    each = binomial_interval(sum(counts), 8 * 5000)
    assert high - low == pytest.approx(each[1] - each[0], rel=0.05)
    # Examples that differ less than by chance say no more than independent answers.
    even = make_score([3, 4] * 50, 8)
    assert even.interval(task) == binomial_interval(350, 800)


@pytest.mark.parametrize("right", [0, 3, 8])
def test_examples_that_do_not_differ_count_once_each(right):
    task = AssociativeRecall(seq_len=64, num_pairs=8)
    low, high = make_score([right] * 50, 8).interval(task)
    assert (low, high) == pytest.approx(binomial_interval(50 * right / 8, 50))
    # At 0 and 1 an end is exact.
    assert (low == 0, high == 1) == (right == 0, right == 8)


def test_one_answer_an_example_has_wilsons_interval():
    assert make_score([1] * 2 + [0] * 8, 1).interval(ListOps()) == binomial_interval(2, 10)
    # A whole key is one answer, however many digits it has.
    keys = make_score([5, 5, *[3] * 8], 5)
    assert keys.interval(Passkey()) == binomial_interval(2, 10)


def test_the_interval_covers_the_truth_where_answers_hang_together():
    task, rng = AssociativeRecall(seq_len=64, num_pairs=8), np.random.default_rng(0)
    covered, covered_by_answers, number = 0, 0, 400
    for _ in range(number):
        # The share of right answers differs from example to example, with mean 0.6.
        counts = rng.binomial(8, rng.beta(1.2, 0.8, size=100)).tolist()
        low, high = make_score(counts, 8).interval(task)
        covered += low <= 0.6 <= high
        low, high = binomial_interval(sum(counts), 800)
        covered_by_answers += low <= 0.6 <= high
    assert covered / number == pytest.approx(0.95, abs=0.03)
    assert covered_by_answers / number < 0.8


def test_nothing_is_scored_in_training_mode_or_without_examples():
    task = SelectiveCopying(seq_len=20, num_data_tokens=2)
    with pytest.raises(ValueError, match="evaluation mode, got one in training"):
        score_model(make_model(task).train(), task, draw_examples(task, 1))
    with pytest.raises(ValueError, match="at least one example, got none"):
        score_model(make_model(task), task, [])


def test_a_model_of_nan_is_never_right():
    task = ListOps(seq_len=64)
    model = make_model(task)
    torch.nn.init.constant_(next(model.parameters()), torch.nan)
    examples = draw_examples(task, 40)
    labels = torch.from_numpy(np.stack([example.labels for example in examples]))
    tokens = torch.from_numpy(np.stack([example.tokens for example in examples]))
    _, classes = answer_logits(model, task, {"tokens": tokens, "labels": labels})
    # The index of the largest of NaN is 0, which is an answer, too.
    assert (classes == 0).any()
    assert score_model(model, task, examples).accuracy(task) == 0.0
