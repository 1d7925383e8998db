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

__all__ = ["Score", "binomial_interval", "draw_examples", "majority", "score_batch", "score_model"]

# Two standard deviations, to be exact: 95 % of a normal distribution.
_Z = 1.959964
_TOKENS_PER_BATCH = 2**16


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model has answered.

    Attributes:
        num_examples: Examples asked.
        num_right_examples: Examples with every answer right.
        num_labels: Answers asked.
        num_right_labels: Answers that are right.
        nats: Summed cross-entropy of the answers.
    """

    num_examples: int = 0
    num_right_examples: int = 0
    num_labels: int = 0
    num_right_labels: int = 0
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
    is_right = logits.argmax(-1) == classes
    is_asked = batch["labels"] != IGNORE_INDEX
    is_wrong = torch.zeros_like(is_asked).masked_scatter(is_asked, ~is_right)
    num_examples = int(is_asked.any(1).sum())
    return Score(
        num_examples=num_examples,
        num_right_examples=num_examples - int(is_wrong.any(1).sum()),
        num_labels=len(classes),
        num_right_labels=int(is_right.sum()),
        nats=float(functional.cross_entropy(logits.float(), classes, reduction="sum")),
    )


def majority(task: Task, examples: Sequence[Example]) -> float:
    """Returns the accuracy of whoever always gives the answer that is the most frequent in these.

    Args:
        task: The task.
        examples: Of this task.
    """
    answers = [x.labels[x.labels != IGNORE_INDEX].tolist() for x in examples]
    asked = [tuple(x) for x in answers] if task.scores_whole else [y for x in answers for y in x]
    return Counter(asked).most_common(1)[0][1] / len(asked)


def binomial_interval(right: int, asked: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share by Wilson's formula (JASA 1927).

    Args:
        right: How many were right.
        asked: How many there were.
    """
    share, square = right / asked, _Z**2
    centre = (share + square / (2 * asked)) / (1 + square / asked)
    spread = share * (1 - share) / asked + square / (4 * asked**2)
    half = _Z * math.sqrt(spread) / (1 + square / asked)
    # At 0 and 1 an end of the interval is exact.
    low = 0.0 if right == 0 else centre - half
    return low, 1.0 if right == asked else centre + half
