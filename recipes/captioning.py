r"""Trains a multiway model to write captions under images.

    python -m recipes.captioning fit --config configs/captioning/quickstart.yaml
    python -m recipes.captioning test --config configs/captioning/quickstart.yaml
    python -m recipes.captioning predict --config configs/captioning/quickstart.yaml \
        --data.predict_source photos/

Every option: `python -m recipes.captioning fit --help`.

Shapes: b batch, t text_len.
"""

import dataclasses
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional

import longnet_zoo as lz
from longnet_zoo.layers import MemorySaving
from longnet_zoo.text.generation import printable
from longnet_zoo.tokenizers import Tokenizer
from recipes.callbacks import ExactResumption, SkippedSamples, Throughput
from recipes.captioning_data import CaptionDataModule
from recipes.captioning_scores import CaptionScores
from recipes.checkpoints import check_checkpoint
from recipes.classification_metrics import log_counts
from recipes.classifiers import changed_options, check_modality
from recipes.cli import run
from recipes.optimization import OptimizationConfig, total_grad_norm
from recipes.run_folder import update_record
from recipes.text_packing import IGNORE_INDEX
from recipes.trainer_batches import run_steps

__all__ = ["Captioner", "main"]


class Captioner(L.LightningModule):
    """A multiway model with its training, evaluation and prediction as a writer of captions.

    Args:
        model_name: Name in the registry, one of `longnet_beit3_*`.
        model_options: Options of `longnet_zoo.create_model` for it, such as `img_size` or
            `segment_lengths`.
        pretrained: Weights to start from, as in `longnet_zoo.create_model`; they need the
            vocabulary of the tokenizer. Where a checkpoint is given, they are not read.
        max_new_tokens: Most tokens of a caption that is written; null: as many as the model reads.
        optimization: Optimizer and learning rate, by optimizer step.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
    """

    def __init__(
        self,
        *,
        model_name: str = "longnet_beit3_tiny",
        model_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        max_new_tokens: int | None = None,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        memory_saving: MemorySaving | None = None,
    ) -> None:
        super().__init__()
        self.optimization = OptimizationConfig.of(optimization)
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        check_modality(model_name, "vision-language", kind="a multiway model")
        options = {"heads": ("masked_text",), **(model_options or {})}
        self.model = lz.create_model(model_name, pretrained=pretrained, **options)
        self.model.set_memory_saving(memory_saving)
        # Nothing is hidden here, and processes wait for the gradient of every other parameter.
        self.model.image_embed.mask_token.requires_grad_(False)
        most = self.model.config.max_text_len
        self.max_new_tokens = most if max_new_tokens is None else max_new_tokens
        if not 1 <= self.max_new_tokens <= most:
            raise ValueError(
                f"max_new_tokens must be from 1 to the model's max_text_len={most}, or null for "
                f"that, got {max_new_tokens}."
            )
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "model_options": changed_options(self.model, model_name),
                "max_new_tokens": max_new_tokens,
                "optimization": dataclasses.asdict(self.optimization),
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )
        self.scores: CaptionScores | None = None
        self._losses: list[Tensor] = []

    @property
    def tokenizer(self) -> Tokenizer:
        """Makes tokens of captions, and captions of tokens."""
        return self.trainer.datamodule.batch_tokenizer.tokenizer

    def configure_callbacks(self) -> list[L.Callback]:
        """Returns what makes a resumed run equal an unbroken one, from Python too."""
        count = lambda batch: len(batch["images"])  # noqa: E731
        return [
            ExactResumption(),
            Throughput(unit="pairs", count=count),
            SkippedSamples(unit="pairs", count=count),
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        """Makes the optimizer and its schedule."""
        return self.optimization.build(self.model, run_steps=run_steps(self.trainer))

    def texts(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns captions as the model reads them.

        Args:
            batch: Batch of the data module.

        Returns:
            Tokens (b, 1 + t), which begin with the token that also ends them, and what of them is
            padding; all of a pair that could not be read, but the first.
        """
        tokens = functional.pad(batch["tokens"], (1, 0), value=self.tokenizer.eod_id)
        is_padding = tokens == self.trainer.datamodule.batch_tokenizer.pad_id
        is_missing = torch.tensor([not name for name in batch["names"]], device=tokens.device)
        is_padding[:, 1:] |= is_missing[:, None]
        return tokens, is_padding

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean loss of a batch."""
        tokens, is_padding = self.texts(batch)
        loss = self.model.caption_loss(batch["images"], tokens, text_padding_mask=is_padding)
        self._losses.append(loss.detach())
        log_counts(self, "train", batch)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step, which may have accumulated several batches."""
        self.log("train_loss", torch.stack(self._losses).mean(), sync_dist=True)
        self._losses.clear()
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))
        self.log("grad_norm", total_grad_norm(self.model))

    def new_scores(self) -> CaptionScores:
        """Returns empty sums for an evaluation."""
        groups = getattr(self.trainer.datamodule, "word_groups", {})
        return CaptionScores(token_bytes=self._token_bytes(), word_groups=groups)

    def score(self, batch: dict[str, Any], scores: CaptionScores) -> None:
        """Adds how well the model expects the tokens of a batch."""
        tokens, is_padding = self.texts(batch)
        logits = self.model.caption_logits(
            batch["images"], tokens[:, :-1], text_padding_mask=is_padding[:, :-1]
        )
        scores.add_logits(logits, tokens[:, 1:].masked_fill(is_padding[:, 1:], IGNORE_INDEX))

    def score_texts(self, batch: dict[str, Any], scores: CaptionScores) -> list[tuple[str, str]]:
        """Writes captions for a batch and adds them; returns the true and the written ones."""
        pairs = [
            (true, text)
            for name, true, text in zip(
                batch["names"], batch["captions"], self.write(batch["images"]), strict=True
            )
            if name
        ]
        scores.add_texts([true for true, _ in pairs], [text for _, text in pairs])
        return pairs

    def write(self, images: Tensor) -> list[str]:
        """Returns the likeliest caption, token by token, of each image."""
        tokenizer = self.tokenizer
        tokens = self.model.generate(
            images, max_new_tokens=self.max_new_tokens, end_id=tokenizer.eod_id
        )
        return [printable(tokenizer.decode(row)) for row in tokens.tolist()]

    def on_validation_epoch_start(self) -> None:
        """Begins new sums."""
        self.scores = self.new_scores()

    def on_test_epoch_start(self) -> None:
        """Begins new sums."""
        self.scores = self.new_scores()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds a batch."""
        assert self.scores is not None
        self.score(batch, self.scores)
        log_counts(self, "val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds a batch, for which captions are written as well."""
        assert self.scores is not None
        self.score(batch, self.scores)
        self.score_texts(batch, self.scores)
        log_counts(self, "test", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val_loss`, `val_bits_per_byte` and `val_token_accuracy`."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Logs the same of the test, and figures of the captions that were written."""
        figures = self._log_scores("test")
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            metrics = {f"test_{name}": value for name, value in figures.items()}
            update_record(self.trainer.default_root_dir, metrics=metrics)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, str]]:
        """Prints name and caption of each image, and returns them."""
        rows = zip(batch["names"], self.write(batch["images"]), strict=True)
        # Without a name it is none of the data.
        written = [(name, text) for name, text in rows if name]
        for name, text in written:
            print(f"{name}\t{text}")
        return written

    def progress_text(self, metrics: dict[str, float]) -> str:
        """Returns what a progress bar shows of the newest metrics."""
        names = {"train loss": "train_loss", "val loss": "val_loss"}
        parts = [f"{short} {metrics[name]:.3f}" for short, name in names.items() if name in metrics]
        if "val_token_accuracy" in metrics:
            parts.append(f"tokens right {metrics['val_token_accuracy']:.1%}")
        if "pairs_per_second" in metrics:
            parts.append(f"{metrics['pairs_per_second']:,.1f} pairs/s")
        return "  ".join(parts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another model, and to resume with another optimizer.

        Raises:
            ValueError: The model or the optimizer differs; the message says in what.
        """
        check_checkpoint(self, checkpoint)

    def _token_bytes(self) -> Tensor:
        # One more than the tokenizer has, where that has no padding.
        known = self.tokenizer.token_bytes
        return functional.pad(known, (0, self.model.config.vocab_size - len(known)))

    def _log_scores(self, split: Literal["val", "test"]) -> dict[str, float]:
        assert self.scores is not None
        self.scores.reduce(self.trainer.strategy)
        figures = self.scores.figures()
        if not self.trainer.sanity_checking:
            for name, value in figures.items():
                self.log(f"{split}_{name}", value, sync_dist=True)
        return figures


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(Captioner, CaptionDataModule, args=args)


if __name__ == "__main__":
    main()
