r"""Trains a model on a task that needs a long memory, at a number of training FLOPs.

    python -m recipes.long_range fit --config configs/long_range/mqar.yaml
    python -m recipes.long_range fit --config configs/long_range/mqar.yaml \
        --model.attention dense --trainer.default_root_dir runs/long_range/mqar-dense
    python -m recipes.long_range test --config configs/long_range/mqar.yaml
    longnet-zoo evaluate --task mqar --lengths 1024 --option vocab_size=64 --option num_pairs=8 \
        --models dilated=runs/long_range/mqar/model dense=runs/long_range/mqar-dense/model

With the same `train_flops`, dilated and dense attention get the same compute: what a step costs is
counted, and sets the number of steps. Every option: `python -m recipes.long_range fit --help`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_zoo.bench import environment
from longnet_zoo.layers import MemorySaving
from longnet_zoo.long_range import (
    TRAINING_FILE,
    Score,
    Task,
    answer_logits,
    batch_accuracy,
    draw_examples,
    flops_per_example,
    majority,
    make_task,
    score_batch,
    score_model,
)
from recipes.callbacks import ExactResumption, Throughput
from recipes.checkpoints import check_checkpoint
from recipes.cli import run
from recipes.long_range_data import LengthPlan, LongRangeDataModule, growing_tasks
from recipes.long_range_model import make_model
from recipes.optimization import OptimizationConfig, total_grad_norm
from recipes.run_folder import update_record

__all__ = ["LongRange", "main"]


class LongRange(L.LightningModule):
    """A registered model that learns a long-range task.

    Args:
        task: mqar, listops, passkey, pathfinder or selective_copying.
        seq_len: Tokens of an example; null: as usual for the task.
        task_options: Other options of the task, such as `num_pairs`.
        start_len: Length to begin with, which doubles until it is `seq_len`; null: all examples
            have `seq_len`.
        model_name: Name in the registry: a model of text, or a longvit for pathfinder.
        pretrained: Weights to start from, as in `longnet_zoo.create_model`; what they cost is no
            part of `train_flops`.
        model_options: Options of `longnet_zoo.create_model` for it, such as `embed_dim`. Vocabulary
            and classes follow from the task, segments and rates are given below.
        attention: "dilated", or "dense" for one segment and all else the same.
        segment_lengths: Segments of dilated attention; null: those of the model.
        dilation_rates: Their rates; null: those of the model.
        train_flops: FLOPs of the run, forward and backward, which set the number of steps; null
            where `trainer.max_steps` is given.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
        optimization: Optimizer and learning rate.
    """

    def __init__(
        self,
        *,
        task: str = "mqar",
        seq_len: int | None = None,
        task_options: dict[str, Any] | None = None,
        start_len: int | None = None,
        model_name: str | None = "longnet_lm_tiny",
        pretrained: bool | str = False,
        model_options: dict[str, Any] | None = None,
        attention: Literal["dilated", "dense"] = "dilated",
        segment_lengths: tuple[int, ...] | None = None,
        dilation_rates: tuple[int, ...] | None = None,
        train_flops: float | None = None,
        memory_saving: MemorySaving | None = None,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.task = make_task(task, seq_len=seq_len, **(task_options or {}))
        self.tasks = growing_tasks(self.task, start_len)
        self.train_flops = train_flops
        if train_flops is not None and train_flops <= 0:
            raise ValueError(f"train_flops must be positive, got {train_flops}.")
        self.optimization = OptimizationConfig.of(optimization)
        model_name = model_name or "longnet_lm_tiny"
        self.model, saved_options = make_model(
            self.task,
            name=model_name,
            pretrained=pretrained,
            options=model_options or {},
            attention=attention,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
        )
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        self.model.set_memory_saving(memory_saving)
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "task": task,
                "seq_len": self.task.seq_len,
                "task_options": task_options,
                "start_len": start_len,
                "model_name": model_name,
                "model_options": saved_options,
                "attention": attention,
                "train_flops": train_flops,
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
                "optimization": dataclasses.asdict(self.optimization),
            }
        )
        self.plan = LengthPlan(tasks=self.tasks, steps=(1,) * len(self.tasks))
        self._sums = Score()
        self._losses: list[Tensor] = []
        self._environment: dict[str, Any] = {}

    def configure_callbacks(self) -> list[L.Callback]:
        """Returns what makes a resumed run equal an unbroken one, from Python too."""
        return [ExactResumption(), Throughput()]

    def setup(self, stage: str) -> None:
        """Plans the steps of a training.

        Raises:
            ValueError: The run has no end, or two.
        """
        trainer = self.trainer
        if stage != "fit" or trainer.state.fn != "fit":
            return
        max_steps = trainer.max_steps
        if trainer.fast_dev_run:
            self.plan = LengthPlan.for_steps(self.tasks[-1:], max_steps)
        elif (self.train_flops is None) == (max_steps <= 0):
            raise ValueError(
                "either train_flops or trainer.max_steps ends the training, got "
                f"train_flops={self.train_flops} and max_steps={max_steps}. Give one of them."
            )
        elif self.train_flops is None:
            self.plan = LengthPlan.for_steps(self.tasks, max_steps)
        else:
            self.plan = LengthPlan.for_flops(self.tasks, self.step_flops(), self.train_flops)
            trainer.fit_loop.epoch_loop.max_steps = self.plan.num_steps

    def step_flops(self) -> list[float]:
        """Returns the FLOPs of an optimizer step at each length, shortest first."""
        tokens = self._step_examples() * self.task.seq_len
        return [
            float(flops_per_example(self.model, task, is_training=True)) * (tokens // task.seq_len)
            for task in self.tasks
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        """Makes the optimizer and its schedule."""
        return self.optimization.build(self.model, run_steps=self.plan.num_steps)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss of a batch."""
        task = self._task_of(batch)
        logits, classes = answer_logits(self.model, task, batch)
        loss = F.cross_entropy(logits.float(), classes)
        accuracy = batch_accuracy(task, logits, classes, batch["labels"])
        self._losses.append(torch.stack([loss.detach(), accuracy]))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step, which may have accumulated several batches."""
        loss, accuracy = torch.stack(self._losses).mean(0)
        self._losses.clear()
        self.log("train_loss", loss, sync_dist=True)
        self.log("train_accuracy", accuracy, sync_dist=True)
        self.log("seq_len", float(self.plan.task(self.global_step).seq_len))
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))
        self.log("grad_norm", total_grad_norm(self.model))

    def on_validation_epoch_start(self) -> None:
        """Begins a new sum."""
        self._sums = Score()

    def on_test_epoch_start(self) -> None:
        """Begins a new sum."""
        self._sums = Score()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the answers to a batch."""
        self._sums += score_batch(self.model, self.task, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the answers to a batch."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val_loss` and `val_accuracy`."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test_loss` and `test_accuracy`."""
        self._log_held_out("test")

    def on_fit_start(self) -> None:
        """Notes the code and the machine before either can change."""
        self._environment = environment(self.device)

    def on_fit_end(self) -> None:
        """Saves the model with what is known of its training, and asks the test examples."""
        trainer = self.trainer
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        options = dataclasses.asdict(self.task)
        training = {
            "task": self.task.name,
            "seq_len": options.pop("seq_len"),
            "task_options": options,
            "attention": self.hparams["attention"],
            "steps": self.global_step,
            "train_flops": self.plan.flops(self.step_flops(), self.global_step),
            "example_flops": flops_per_example(self.model, self.task),
        }
        self.model.save_pretrained(folder / "model")
        (folder / "model" / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n")
        test = self._ask_test_examples()
        update_record(folder, training=training, test=test, environment=self._environment)
        share, low, high = (100 * x for x in (test["right"] / test["asked"], *test["interval"]))
        print(
            f"{self.task.name} at {self.task.seq_len:,} tokens: {share:.1f} % right "
            f"({low:.1f} to {high:.1f} %), chance {100 * self.task.chance:.2g} %, after "
            f"{self.global_step:,} steps, {training['train_flops']:.3g} FLOPs\n"
            f"Model        {folder / 'model'}"
        )

    def progress_text(self, metrics: dict[str, float]) -> str:
        """Returns what a progress bar shows of the newest metrics."""
        parts = [
            f"{split} {100 * metrics[f'{split}_accuracy']:.1f} %"
            for split in ("train", "val")
            if f"{split}_accuracy" in metrics
        ]
        if "seq_len" in metrics:
            parts.append(f"{metrics['seq_len']:,.0f} tokens long")
        return "  ".join(parts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what has been read so far."""
        read = self.plan.examples_read(self.global_step, self._step_examples())
        checkpoint["examples_read"] = read

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses another model's weights, and to resume with another optimizer or other lengths.

        Raises:
            ValueError: The model, the optimizer or what was read differs; the message says in what.
        """
        check_checkpoint(self, checkpoint)
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit" and not trainer.fast_dev_run:
            steps, read = checkpoint["global_step"], checkpoint.get("examples_read", {})
            self.plan.check_resumed(steps, self._step_examples(), read)

    def _step_examples(self) -> int:
        """Returns the examples of an optimizer step at the longest length."""
        trainer = self.trainer
        return trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches

    def _ask_test_examples(self) -> dict[str, Any]:
        """Returns what a table says of the run, by name."""
        data = self.trainer.datamodule
        examples = draw_examples(self.task, data.test_examples, seed=data.seed)
        score = score_model(self.model.eval(), self.task, examples)
        return {
            **dict(zip(("right", "asked"), score.counts(self.task), strict=True)),
            "interval": score.interval(self.task),
            "examples": len(examples),
            "chance": self.task.chance,
            "majority": majority(self.task, examples, seed=data.seed),
        }

    def _task_of(self, batch: dict[str, Tensor]) -> Task:
        """Returns the task at the length of a batch."""
        seq_len = batch["tokens"].shape[1]
        return next(task for task in self.tasks if task.seq_len == seq_len)

    def _log_held_out(self, split: Literal["val", "test"]) -> None:
        sums = torch.tensor(dataclasses.astuple(self._sums), dtype=torch.float64)
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()
        names = [field.name for field in dataclasses.fields(Score)]
        score = Score(**dict(zip(names, sums.tolist(), strict=True)))
        self.log(f"{split}_loss", score.nats / score.num_labels, sync_dist=True)
        self.log(f"{split}_accuracy", score.accuracy(self.task), sync_dist=True)


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(LongRange, LongRangeDataModule, args=args)


if __name__ == "__main__":
    main()
