"""Accuracy of models by length of the sequence, runs of one label taken together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from longnet_zoo.bench import available_mib
from longnet_zoo.models import ModelConfig
from longnet_zoo.weights.keys import as_arguments

from .reading import check_model, flops_per_example
from .score import Score, draw_examples, majority, score_model
from .task import Example, Task, check_range

__all__ = ["Cell", "evaluate", "make_cell"]

# Activations of a forward pass, in numbers per token and channel: the hidden layer of the
# feed-forward network and a dozen of the residual stream's size.
_NUMBERS_PER_CHANNEL = 20
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one label came to at one length.

    Attributes:
        label: The label.
        seq_len: Tokens of an example.
        accuracies: Accuracy of each run; empty where there is none.
        low: Lower end: the worst of several runs, else of the 95 % interval of one.
        high: Upper end.
        chance: Accuracy of a guess.
        majority: Accuracy, at the examples asked, of always giving the answer that is the most
            frequent in training examples.
        num_examples: Examples asked, of each run.
        flops: FLOPs of one example, forward.
        train_flops: FLOPs of the training, the mean over runs; None where it is not known.
        train_seq_lens: Lengths that the runs were trained at, where that is known.
        reason: Why there is no accuracy.
    """

    label: str
    seq_len: int
    accuracies: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0
    chance: float
    majority: float
    num_examples: int
    flops: int
    train_flops: float | None = None
    train_seq_lens: tuple[int, ...] = ()
    reason: str = ""

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return fmean(self.accuracies)


def make_cell(
    label: str,
    accuracies: Sequence[float],
    interval: tuple[float, float],
    *,
    trainings: Sequence[dict[str, Any]] = (),
    **facts: Any,
) -> Cell:
    """Puts the runs of a label at one length together.

    Args:
        label: The label.
        accuracies: Accuracy of each run.
        interval: The 95 % interval of the first one, which is the spread if there is no other.
        trainings: What is known of their trainings.
        **facts: Other fields of `Cell`.
    """
    low, high = interval if len(accuracies) == 1 else (min(accuracies), max(accuracies))
    return Cell(
        label=label,
        accuracies=tuple(accuracies),
        low=low,
        high=high,
        **_training_facts(trainings),
        **facts,
    )


def _training_facts(trainings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    budgets = [known["train_flops"] for known in trainings if "train_flops" in known]
    lengths = {known["seq_len"] for known in trainings if "seq_len" in known}
    return {
        "train_flops": fmean(budgets) if budgets else None,
        "train_seq_lens": tuple(sorted(lengths)),
    }


def evaluate(
    models: Sequence[tuple[str, nn.Module, dict[str, Any]]],
    tasks: Sequence[Task],
    *,
    num_examples: int = 200,
    seeds: int = 1,
    on_start: Callable[[str, int], object] = lambda words, seq_len: None,
    on_score: Callable[[str, int], object] = lambda label, seq_len: None,
) -> Iterator[Cell]:
    """Evaluates models at each length, all on the same test examples.

    Args:
        models: Label, model in evaluation mode, and what is known of its training. Runs with the
            same label become one cell.
        tasks: The task at each length.
        num_examples: Examples of each seed.
        seeds: Seeds of examples; each brings others.
        on_start: Called with what begins, a label or "drawing examples", and the length.
        on_score: Called with label and length after each model.

    Yields:
        A cell for each length and label, lengths first; where memory does not suffice, it says so.

    Raises:
        ValueError: A model cannot do a task, runs of a label are of different models, or a number
            is below 1 or above 2**24.
        TypeError: A number is no integer.
    """
    check_range("num_examples", num_examples, least=1)
    check_range("seeds", seeds, least=1)
    for label, model, _ in models:
        for task in tasks:
            check_model(model, task, name=label)
    _check_runs(models)
    for task in tasks:
        on_start("drawing examples", task.seq_len)
        examples = [
            x for seed in range(seeds) for x in draw_examples(task, num_examples, seed=seed)
        ]
        facts = {
            "seq_len": task.seq_len,
            "chance": task.chance,
            "majority": majority(task, examples),
            "num_examples": len(examples),
        }
        for label in dict.fromkeys(label for label, _, _ in models):
            runs = [(model, known) for name, model, known in models if name == label]
            flops = flops_per_example(runs[0][0], task)
            on_start(label, task.seq_len)
            yield _evaluate_label(label, task, runs, examples, {**facts, "flops": flops})
            on_score(label, task.seq_len)


def _check_runs(models: Sequence[tuple[str, nn.Module, dict[str, Any]]]) -> None:
    """Refuses different models under one label, of which a mean says nothing."""
    firsts: dict[str, dict[str, Any]] = {}
    for label, model, _ in models:
        assert isinstance(model.config, ModelConfig)
        found = {"model": type(model).__name__, **model.config.options()}
        first = firsts.setdefault(label, found)
        names = [name for name in found if name not in first or first[name] != found[name]]
        if names:
            was, now = (as_arguments({x: own.get(x) for x in names[:3]}) for own in (first, found))
            raise ValueError(
                f"runs of a label must be of the same model, got {label!r} with {was} and with "
                f"{now}. Give them labels of their own."
            )


def _evaluate_label(
    label: str,
    task: Task,
    runs: Sequence[tuple[nn.Module, dict[str, Any]]],
    examples: Sequence[Example],
    facts: dict[str, Any],
) -> Cell:
    scores: list[Score] = []
    trainings = [known for _, known in runs]
    for model, _ in runs:
        score = _score_within_memory(model, task, examples)
        if isinstance(score, str):
            return Cell(label=label, reason=score, **_training_facts(trainings), **facts)
        scores.append(score)
    accuracies = [score.accuracy(task) for score in scores]
    return make_cell(label, accuracies, scores[0].interval(task), trainings=trainings, **facts)


def _score_within_memory(model: nn.Module, task: Task, examples: Sequence[Example]) -> Score | str:
    """Returns the score, or why there is none."""
    weight = next(model.parameters())
    embed_dim: int = model.config.embed_dim  # type: ignore[union-attr, assignment]
    needed = task.seq_len * embed_dim * _NUMBERS_PER_CHANNEL * weight.element_size() / 2**20
    available = available_mib(weight.device)
    # A system that hands out more memory than it has kills the process, so this comes first.
    if needed > available:
        return f"out of memory: {needed:,.0f} MiB needed, {available:,.0f} free"
    # Where it cannot be told how much is free, as many as usual.
    fitting = None if math.isinf(available) else max(1, int(available // needed))
    try:
        return score_model(model, task, examples, batch_size=fitting)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        return "out of memory"
