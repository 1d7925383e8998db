r"""Trains a causal language model on text or code.

    python -m recipes.text_lm fit --config configs/text/quickstart.yaml
    python -m recipes.text_lm fit --config configs/text/quickstart.yaml --ckpt_path last
    python -m recipes.text_lm validate --config configs/text/quickstart.yaml
    python -m recipes.text_lm predict --config configs/text/quickstart.yaml \
        --model.sampling.prompts '["import os\n\n\ndef "]'

Every option: `python -m recipes.text_lm fit --help`. Shapes: b batch, n seq_len.
"""

import dataclasses
import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import longnet_zoo as lz
from longnet_zoo.layers import MemorySaving
from longnet_zoo.parallel import Layout
from longnet_zoo.text.generation import generate_text, printable
from longnet_zoo.tokenizers import Tokenizer
from recipes.callbacks import ExactResumption, Throughput
from recipes.checkpoints import check_checkpoint
from recipes.cli import run
from recipes.context_warmup import ContextWarmup
from recipes.metrics import BitsPerByte
from recipes.optimization import OptimizationConfig, total_grad_norm
from recipes.sampling import SamplingConfig
from recipes.text_data import TextDataModule
from recipes.text_packing import IGNORE_INDEX, Objective
from recipes.text_parts import shard_batch

__all__ = ["TextLM", "main"]


class TextLM(L.LightningModule):
    """A registered causal language model with its training, evaluation and sampling.

    Args:
        model_name: Name in the registry (`longnet-zoo list`); None takes `longnet_lm_tiny`, or
            `longnet_mlm_tiny` for the masked twin.
        model_options: Options of `longnet_zoo.create_model` for it, such as `vocab_size`,
            `segment_lengths` or `dropout`.
        optimization: Optimizer and learning rate.
        context_warmup: How the context of training batches grows to the whole window; null starts
            with the whole window.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
        sampling: How `predict` and the report write text.
    """

    objective: Objective = "causal"
    default_model = "longnet_lm_tiny"
    default_prompts: tuple[str, ...] = ("import os\n\n\ndef ",)

    def __init__(
        self,
        *,
        model_name: str | None = None,
        model_options: dict[str, Any] | None = None,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        context_warmup: ContextWarmup | None = None,
        memory_saving: MemorySaving | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        # Written out, so that a checkpoint does not depend on the default.
        model_name = model_name or self.default_model
        self.optimization = OptimizationConfig.of(optimization)
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "model_options": model_options,
                "optimization": dataclasses.asdict(self.optimization),
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )
        self.context_warmup = context_warmup
        self.sampling = sampling
        self.prompts = sampling.prompts or self.default_prompts
        self.model = lz.create_model(model_name, **(model_options or {}))
        if self.model.config.is_causal != (self.objective == "causal"):
            raise ValueError(
                f"{type(self).__name__} trains with objective={self.objective!r}, got "
                f"model_name={model_name!r} with is_causal={self.model.config.is_causal}. "
                "recipes.text_lm is for causal models, recipes.text_mlm for the others."
            )
        self.model.set_memory_saving(memory_saving)
        self.tokenizer: Tokenizer | None = None
        self.register_buffer("token_bytes", None, persistent=False)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.held_out = BitsPerByte()

    def configure_callbacks(self) -> list[L.Callback]:
        """Returns what makes a resumed run equal an unbroken one, from Python too."""
        return [ExactResumption(), Throughput()]

    def configure_optimizers(self) -> dict[str, Any]:
        """Makes the optimizer and its schedule."""
        # Not `estimated_stepping_batches`: it sets the loader up before its position is restored.
        max_steps = self.trainer.max_steps
        return self.optimization.build(
            self.model, run_steps=max_steps if max_steps > 0 else float("inf")
        )

    def setup(self, stage: str) -> None:
        """Checks the objective of the data, and takes over its tokenizer."""
        objective = getattr(self.trainer.datamodule, "objective", self.objective)
        if objective != self.objective:
            # A model that sees both sides would see the next token.
            raise ValueError(
                f"{type(self).__name__} needs data.objective={self.objective!r}, got "
                f"{objective!r}. Set it, or use the other recipe: text_lm is causal, text_mlm "
                "masked."
            )
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", self.tokenizer)
        if tokenizer is None:
            raise ValueError(
                "the task needs the tokenizer of its data, got datamodule="
                f"{self.trainer.datamodule!r}. Pass datamodule=TextDataModule(...) to the Trainer, "
                "or call attach_tokenizer first."
            )
        self.attach_tokenizer(tokenizer)

    def attach_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Takes a tokenizer, which says how many bytes a token stands for.

        Raises:
            ValueError: The model has fewer token ids than the tokenizer.
        """
        vocab_size = self.model.config.vocab_size
        if vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the model must have every id of the tokenizer, got vocab_size={vocab_size} and "
                f"a tokenizer with {tokenizer.vocab_size} ids. Set "
                f"model.model_options.vocab_size to {tokenizer.vocab_size}."
            )
        self.tokenizer = tokenizer
        self.token_bytes = tokenizer.token_bytes.to(self.device)

    def shard_batch(
        self, batch: dict[str, Any], mesh: DeviceMesh, *, layout: Layout
    ) -> dict[str, Any]:
        """Returns this process' part of a batch, for `SequenceParallelStrategy`.

        Args:
            batch: Batch of whole sequences, the same on all processes of the mesh; or a part, which
                stays as it is.
            mesh: The processes that share it.
            layout: Which tokens a process takes.

        Raises:
            ValueError: The context warm-up cannot cut parts.
        """
        warmup = self.context_warmup if self.trainer.training else None
        if warmup is not None and batch.get("is_part"):
            raise ValueError(
                "context_warmup cuts whole sequences, got it with data of which a process reads "
                "its part only. Leave context_warmup out, or use recipes.text_data."
            )
        if warmup is not None:
            batch = warmup.cut(batch, self.global_step)
        return shard_batch(batch, mesh, layout=layout)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss of a batch, which the context warm-up shortens."""
        if self.context_warmup is not None and not batch.get("is_part"):
            # In place, so that the throughput counts the tokens that were read. The hook made for
            # this, `on_after_batch_transfer`, makes Lightning warn wherever there is a data module.
            batch.update(self.context_warmup.cut(batch, self.global_step))
        loss = self._loss(batch, reduction="mean")
        self._batches.append((loss.detach(), *self._count(batch["labels"])))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step, which may have accumulated several batches."""
        losses, tokens, num_bytes = (torch.stack(x) for x in zip(*self._batches, strict=True))
        self._batches.clear()
        sums = torch.stack([(losses * tokens).sum(), num_bytes.sum().float()])
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.log("train_loss", losses.mean(), sync_dist=True)
        self.log("train_bits_per_byte", sums[0] / math.log(2) / sums[1].clamp(min=1))
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))
        self.log("grad_norm", total_grad_norm(self.model))

    def on_validation_epoch_start(self) -> None:
        """Begins a new sum."""
        self.held_out = BitsPerByte()

    def on_test_epoch_start(self) -> None:
        """Begins a new sum."""
        self.held_out = BitsPerByte()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the loss of a batch."""
        tokens, num_bytes = self._count(batch["labels"])
        # Of a part, the loss is already that of all processes, which add up at the end.
        share = self.trainer.world_size if batch.get("is_part") else 1
        self.held_out.update(
            nats=float(self._loss(batch, reduction="sum")) / share,
            num_tokens=int(tokens),
            num_bytes=int(num_bytes),
        )

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the loss of a batch."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val_loss` and `val_bits_per_byte`."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test_loss` and `test_bits_per_byte`."""
        self._log_held_out("test")

    def predict_dataloader(self) -> list[str]:
        """Returns the prompts."""
        return list(self.prompts)

    def predict_step(self, batch: str, batch_idx: int) -> str:
        """Prints a prompt with what the model writes after it."""
        text = self.sample(batch)
        if self.trainer.is_global_zero:
            print(f"--- prompt {batch_idx + 1} ---\n{text}\n")
        return text

    def sample(self, prompt: str) -> str:
        """Returns a prompt and the model's continuation of it."""
        assert self.tokenizer is not None
        text = generate_text(self.model, self.tokenizer, prompt, **self.sampling.options())
        return printable(prompt + text)

    def progress_text(self, metrics: dict[str, float]) -> str:
        """Returns what a progress bar shows of the newest metrics."""
        names = {"train": "train_bits_per_byte", "val": "val_bits_per_byte"}
        parts = [f"{short} {metrics[name]:.3f}" for short, name in names.items() if name in metrics]
        parts[-1:] = [f"{part} bits/byte" for part in parts[-1:]]
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        return "  ".join(parts)

    def token_losses(
        self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Returns the loss of each token in nats, (b, n), 0 where there is no label."""
        return self.model.loss(
            tokens, labels, ignore_index=IGNORE_INDEX, reduction="none", cu_seqlens=cu_seqlens
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another model, and to resume with another optimizer.

        Raises:
            ValueError: The model or the optimizer differs; the message says in what.
        """
        check_checkpoint(self, checkpoint)

    def _loss(self, batch: dict[str, Tensor], *, reduction: Literal["mean", "sum"]) -> Tensor:
        return self.model.loss(
            batch["tokens"],
            batch["labels"],
            ignore_index=IGNORE_INDEX,
            reduction=reduction,
            key_padding_mask=batch.get("key_padding_mask"),
            cu_seqlens=batch.get("cu_seqlens"),
        )

    def _count(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how many tokens have a loss, and how many bytes they stand for."""
        has_loss = labels != IGNORE_INDEX
        num_bytes = self.token_bytes[labels.clamp(min=0)] * has_loss
        return has_loss.sum(), num_bytes.sum()

    def _log_held_out(self, split: Literal["val", "test"]) -> None:
        self.held_out.reduce(self.trainer.strategy)
        self.log(f"{split}_loss", self.held_out.loss, sync_dist=True)
        self.log(f"{split}_bits_per_byte", self.held_out.bits_per_byte, sync_dist=True)


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(TextLM, TextDataModule, args=args)


if __name__ == "__main__":
    main()
