"""How often a model is right, and how sure that is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .reading import answer_logits
from .task import IGNORE_INDEX, Example, Task, stack_examples

__all__ = [
    "Score",
    "batch_accuracy",
    "binomial_interval",
    "draw_examples",
    "majority",
    "score_batch",
    "score_model",
]

# Two standard deviations, to be exact: 95 % of a normal distribution.
_Z = 1.959964
_TOKENS_PER_BATCH = 2**16
# Fewer leave it open which answer is the most frequent.
_LEAST_TRAINING_EXAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model has answered.

    Attributes:
        num_examples: Examples asked.
        num_right_examples: Examples with every answer right.
        num_labels: Answers asked.
        num_right_labels: Answers that are right.
        right_squares: Right answers of each example, squared and summed: it is large where the
            answers of an example are right or wrong together.
        nats: Summed cross-entropy of the answers.
    """

    num_examples: int = 0
    num_right_examples: int = 0
    num_labels: int = 0
    num_right_labels: int = 0
    right_squares: int = 0
    nats: float = 0.0

    def __add__(self, other: Score) -> Score:
        """Returns the score of both together."""
        sums = {name: x + getattr(other, name) for name, x in asdict(self).items()}
        return Score(**sums)

    def counts(self, task: Task) -> tuple[int, int]:
        """Returns how many were right and how many there were, of what the task counts."""
        if task.scores_whole:
            return self.num_right_examples, self.num_examples
        return self.num_right_labels, self.num_labels

    def accuracy(self, task: Task) -> float:
        """Returns the share of right answers: of whole ones where the task says so."""
        right, asked = self.counts(task)
        return right / asked

    def interval(self, task: Task) -> tuple[float, float]:
        """Returns the 95 % interval of the accuracy, where examples are independent, not answers.

        It is Wilson's for the effective number of answers: those asked over the design effect
        (Kish, Survey Sampling, 1965), that is the variance of the accuracy over what it would be
        if all answers were independent, but at least 1. Where the examples do not differ, the
        effect is unknown, and an example counts as one answer.
        """
        right, asked = self.counts(task)
        effective = asked / self._design_effect(right, asked)
        return binomial_interval(right / asked * effective, effective)

    def _design_effect(self, right: int, asked: int) -> float:
        number = self.num_examples
        # Where single answers count, all examples have equally many. This is the sum over pairs of
        # examples of the squared difference in right answers.
        difference = number * self.right_squares - right**2
        if asked == number or not difference or right == asked:
            return asked / number
        return max(1.0, difference * asked / (number * right * (asked - right)))


def draw_examples(task: Task, number: int, *, seed: int = 0) -> list[Example]:
    """Returns the first test examples.

    Args:
        task: The task.
        number: How many.
        seed: As for `Task.example`.
    """
    return [task.example(index, split="test", seed=seed) for index in range(number)]


@torch.no_grad()
def score_model(
    model: nn.Module, task: Task, examples: Sequence[Example], *, batch_size: int | None = None
) -> Score:
    """Asks a model for the answers of examples.

    Args:
        model: A model that `check_model` accepts, in evaluation mode, on any device.
        task: The task.
        examples: Of this task.
        batch_size: Examples asked at once, at most; None: as many as 65,536 tokens hold.

    Raises:
        ValueError: The model is in training mode, or there are no examples.
    """
    if model.training:
        raise ValueError("a model is scored in evaluation mode, got one in training. Call eval().")
    if not examples:
        raise ValueError("a score needs at least one example, got none.")
    device = next(model.parameters()).device
    usual = max(1, _TOKENS_PER_BATCH // task.seq_len)
    batch_size = min(usual, batch_size or usual)
    score = Score()
    for start in range(0, len(examples), batch_size):
        batch = stack_examples(examples[start : start + batch_size])
        score += score_batch(model, task, {name: x.to(device) for name, x in batch.items()})
    return score


@torch.no_grad()
def score_batch(model: nn.Module, task: Task, batch: Mapping[str, Tensor]) -> Score:
    """Asks a model for the answers of a batch; rows without labels do not count.

    Args:
        model: As for `score_model`.
        task: The task.
        batch: `tokens` and `labels`, (b, n), on the model's device.
    """
    logits, classes = answer_logits(model, task, batch)
    right, asked = _count(logits, classes, batch["labels"])
    return Score(
        num_examples=int((asked > 0).sum()),
        num_right_examples=int(((asked > 0) & (right == asked)).sum()),
        num_labels=len(classes),
        num_right_labels=int(right.sum()),
        right_squares=int((right**2).sum()),
        nats=float(functional.cross_entropy(logits.float(), classes, reduction="sum")),
    )


def batch_accuracy(task: Task, logits: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of right answers in a batch, on its device; whole ones as the task says.

    Args:
        task: The task.
        logits: (answers, classes), as `answer_logits` returns them.
        classes: (answers,), likewise.
        labels: (b, n).
    """
    right, asked = _count(logits, classes, labels)
    if task.scores_whole:
        return ((asked > 0) & (right == asked)).sum() / (asked > 0).sum()
    return right.sum() / asked.sum()


def _count(logits: Tensor, classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many answers of each row are right, and how many were asked; (b,) each."""
    is_asked = labels != IGNORE_INDEX
    # The largest of numbers that are none is the first, which may happen to be the answer.
    is_right = (logits.argmax(-1) == classes) & ~logits.isnan().any(-1)
    right = torch.zeros_like(is_asked).masked_scatter(is_asked, is_right)
    return right.sum(1), is_asked.sum(1)


def majority(task: Task, examples: Sequence[Example], *, seed: int = 0) -> float:
    """Returns the accuracy of always giving the answer that is the most frequent in training.

    The answer is that of as many training examples as are asked, and of 200 at least. Of answers
    that are equally frequent it is the one that comes first.

    Args:
        task: The task.
        examples: Of this task, those that are asked.
        seed: Of the training examples, as for `Task.example`.
    """
    number = max(len(examples), _LEAST_TRAINING_EXAMPLES)
    training = (task.example(index, split="train", seed=seed) for index in range(number))
    counts = Counter(answer for example in training for answer in _answers(task, example))
    constant = counts.most_common(1)[0][0]
    asked = [answer for example in examples for answer in _answers(task, example)]
    return asked.count(constant) / len(asked)


def _answers(task: Task, example: Example) -> list[tuple[int, ...]]:
    """Returns what counts as an answer each: the whole one where the task says so."""
    ids = example.labels[example.labels != IGNORE_INDEX].tolist()
    return [tuple(ids)] if task.scores_whole else [(token,) for token in ids]


def binomial_interval(right: float, asked: float) -> tuple[float, float]:
    """Returns the 95 % interval of a share by Wilson's formula (JASA 1927).

    Args:
        right: How many were right.
        asked: How many independent ones there were; need not be whole.
    """
    share, square = right / asked, _Z**2
    centre = (share + square / (2 * asked)) / (1 + square / asked)
    spread = share * (1 - share) / asked + square / (4 * asked**2)
    half = _Z * math.sqrt(spread) / (1 + square / asked)
    # At 0 and 1 an end of the interval is exact.
    low = 0.0 if right == 0 else centre - half
    return low, 1.0 if right == asked else centre + half
