"""Examples of long-range tasks as batches, short sequences first if asked.

A model learns to look something up in short sequences, where that takes few FLOPs, and then to look
farther: lengths double from `start_len` to that of the task, and each takes the same share of the
training FLOPs. Shorter batches have more rows, so that every step reads as many tokens.

Every training example is new. Batch i is a function of seed and i alone.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longnet_zoo.long_range import IGNORE_INDEX, Split, Task
from recipes.data_options import check_least
from recipes.data_ranks import data_rank
from recipes.loader import FILLER, FixedLoader, SeededLoader

__all__ = ["LengthPlan", "LongRangeDataModule", "growing_tasks"]

# More than any run takes.
_NUM_BATCHES = 2**40


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthPlan:
    """Which length the batches of each optimizer step have.

    Attributes:
        tasks: The task at each length, shortest first.
        steps: Optimizer steps at each.
    """

    tasks: tuple[Task, ...]
    steps: tuple[int, ...]

    @classmethod
    def for_flops(
        cls, tasks: Sequence[Task], step_flops: Sequence[float], train_flops: float
    ) -> "LengthPlan":
        """Spends training FLOPs, the same share at each length, to within half a step in all.

        Args:
            tasks: The task at each length, shortest first.
            step_flops: FLOPs of an optimizer step at each.
            train_flops: FLOPs of the run.

        Raises:
            ValueError: They are not enough for a step at each length.
        """
        share = train_flops / len(tasks)
        steps = [round(share / flops) for flops in step_flops[:-1]]
        spent = sum(number * flops for number, flops in zip(steps, step_flops, strict=False))
        steps.append(round((train_flops - spent) / step_flops[-1]))
        if min(steps) < 1:
            raise ValueError(
                f"train_flops must pay for a step at each of {len(tasks)} lengths, got "
                f"{train_flops:.3g} and {max(step_flops):.3g} for the longest. Raise it, or use a "
                "smaller batch_size."
            )
        return cls(tasks=tuple(tasks), steps=tuple(steps))

    @classmethod
    def for_steps(cls, tasks: Sequence[Task], num_steps: int) -> "LengthPlan":
        """Divides steps evenly; what is left over goes to the longest.

        Args:
            tasks: The task at each length, shortest first.
            num_steps: Optimizer steps of the run.
        """
        share = num_steps // len(tasks)
        last = num_steps - share * (len(tasks) - 1)
        return cls(tasks=tuple(tasks), steps=(*[share] * (len(tasks) - 1), last))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(self.steps)

    def task(self, step: int) -> Task:
        """Returns the task of an optimizer step, counted from 0."""
        ends = itertools.accumulate(self.steps)
        found = (task for task, end in zip(self.tasks, ends, strict=True) if step < end)
        return next(found, self.tasks[-1])

    def steps_until(self, num_steps: int) -> tuple[int, ...]:
        """Returns how many of the first `num_steps` steps each length has."""
        ends = [min(end, num_steps) for end in itertools.accumulate(self.steps[:-1])]
        return tuple(end - start for start, end in itertools.pairwise([0, *ends, num_steps]))

    def flops(self, step_flops: Sequence[float], num_steps: int) -> float:
        """Returns what the first steps cost.

        Args:
            step_flops: FLOPs of an optimizer step at each length.
            num_steps: How many steps.
        """
        pairs = zip(self.steps_until(num_steps), step_flops, strict=True)
        return sum((steps * flops for steps, flops in pairs), start=0.0)

    def examples_read(self, num_steps: int, step_examples: int) -> dict[int, int]:
        """Returns how many examples the first steps read, by their length.

        Args:
            num_steps: How many steps.
            step_examples: Examples of a step at the longest length.
        """
        longest = self.tasks[-1].seq_len
        return {
            task.seq_len: steps * step_examples * (longest // task.seq_len)
            for task, steps in zip(self.tasks, self.steps_until(num_steps), strict=True)
            if steps
        }

    def check_resumed(self, num_steps: int, step_examples: int, saved: dict[int, int]) -> None:
        """Refuses to go on with a run that began by another plan.

        Args:
            num_steps: Steps of the run so far.
            step_examples: As for `examples_read`.
            saved: What `examples_read` was for that run.

        Raises:
            ValueError: This plan would have read other examples so far, or of other lengths.
        """
        planned = self.examples_read(num_steps, step_examples)
        if planned != saved:
            got, was = (
                ", ".join(f"{number:,} of {length:,} tokens" for length, number in read.items())
                or "none"
                for read in (planned, saved)
            )
            raise ValueError(
                "a run resumes with the lengths and batches that it began with, or its FLOPs would "
                f"be miscounted, got settings that read {got} in the first {num_steps:,} steps, "
                f"and a checkpoint that has read {was}. Pass the train_flops, trainer.max_steps, "
                "start_len, batch_size and trainer.accumulate_grad_batches of that run, or start "
                "anew without ckpt_path."
            )


def growing_tasks(task: Task, start_len: int | None) -> tuple[Task, ...]:
    """Returns the task at the lengths of a training, shortest first.

    Args:
        task: The task at its length.
        start_len: The first length; None: that of the task.

    Raises:
        ValueError: The first length does not double to the last one.
    """
    lengths = [task.seq_len]
    while start_len is not None and lengths[0] > start_len and lengths[0] % 2 == 0:
        lengths.insert(0, lengths[0] // 2)
    if start_len not in (None, lengths[0]):
        raise ValueError(
            f"start_len must double to seq_len, got start_len={start_len} and "
            f"seq_len={task.seq_len}. Pass for example {lengths[min(2, len(lengths) - 1)]}."
        )
    return tuple(dataclasses.replace(task, seq_len=length) for length in lengths)


class LongRangeDataModule(L.LightningDataModule):
    """Serves examples of the task that the model is trained on.

    Args:
        batch_size: Examples in a batch, for each device; those of shorter lengths are more.
        val_examples: Validation examples.
        test_examples: Test examples.
        seed: Seed of all examples.
        num_workers: Processes that draw examples; 0 draws them in the training process.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        val_examples: int = 64,
        test_examples: int = 200,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.val_examples, self.test_examples = val_examples, test_examples
        check_least(
            batch_size=(batch_size, 1),
            val_examples=(val_examples, 1),
            test_examples=(test_examples, 1),
            seed=(seed, 0),
            num_workers=(num_workers, 0),
        )
        self._train_loader: tuple[L.Trainer | None, SeededLoader] | None = None

    def train_dataloader(self) -> SeededLoader:
        """Returns the training batches; a trainer that asks again gets the same loader."""
        if self._train_loader is None or self._train_loader[0] is not self.trainer:
            self._train_loader = (self.trainer, self._make_train_loader())
        return self._train_loader[1]

    def val_dataloader(self) -> FixedLoader:
        """Returns the validation batches."""
        return self._eval_loader("val", self.val_examples)

    def test_dataloader(self) -> FixedLoader:
        """Returns the test batches."""
        return self._eval_loader("test", self.test_examples)

    def _make_train_loader(self) -> SeededLoader:
        rank, world_size = data_rank(self.trainer)
        stride = self.batch_size * world_size
        plan = self.trainer.lightning_module.plan
        dataset = _TrainBatches(
            plan,
            seed=self.seed,
            stride=stride,
            accumulated=self.trainer.accumulate_grad_batches,
        )
        return SeededLoader(
            dataset,
            num_samples=_NUM_BATCHES * stride,
            unit="examples",
            order={"task": repr(plan.tasks[-1]), "start_len": plan.tasks[0].seq_len},
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            repeat=self.trainer.overfit_batches,
            **self._worker_options(),
        )

    def _eval_loader(self, split: Split, num_examples: int) -> FixedLoader:
        rank, world_size = data_rank(self.trainer)
        return FixedLoader(
            _EvalBatches(self.trainer.lightning_module.task, split=split, seed=self.seed),
            range(num_examples),
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            **self._worker_options(),
        )

    def _worker_options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}


class _TrainBatches(Dataset[dict[str, Tensor]]):
    """Makes the batch of a request (epoch, first example of the task's length, their number)."""

    def __init__(self, plan: LengthPlan, *, seed: int, stride: int, accumulated: int) -> None:
        self._plan, self._seed = plan, seed
        self._examples_per_step = stride * accumulated

    def __getitem__(self, request: tuple[int, int, int]) -> dict[str, Tensor]:
        epoch, first, count = request
        assert epoch == 0  # it is longer than any run
        task = self._plan.task(first // self._examples_per_step)
        more = self._plan.tasks[-1].seq_len // task.seq_len
        indices = range(first * more, (first + count) * more)
        return task.batch(indices, split="train", seed=self._seed)


class _EvalBatches(Dataset[dict[str, Tensor]]):
    """Makes the batch of a request, a list of examples."""

    def __init__(self, task: Task, *, split: Split, seed: int) -> None:
        self._task, self._split, self._seed = task, split, seed

    def __getitem__(self, request: list[int]) -> dict[str, Tensor]:
        places = [max(0, index) for index in request]
        batch = self._task.batch(places, split=self._split, seed=self._seed)
        is_filler = torch.tensor(request) == FILLER
        batch["labels"][is_filler] = IGNORE_INDEX
        return batch
