"""The report of a fine-tuning: held-out text read by the base, with adapters, and merged."""

from itertools import islice
from pathlib import Path

import lightning as L
import torch
from torch import nn

from recipes.context import ContextFigures
from recipes.finetune_lora_merge import load_merged, merge_adapter
from recipes.finetune_lora_model import token_losses
from recipes.metrics import BitsPerByte
from recipes.report import ReportCallback

__all__ = ["AdapterReport"]


class AdapterReport(ReportCallback):
    """Writes the report of the text recipes, and what the adapters are worth.

    Args:
        title: Heading of the report; None takes the name of the base.
        max_windows: Held-out windows to score on each process; None takes all.
        short_context: Tokens of the short context to compare with; None takes seq_len / 16.
        near: Positions at the start of the context to average over; None takes seq_len / 32.
        far: Position from which on to average; None takes seq_len / 4.
        merge: Whether to write the merged model into `merged/` of the run folder, too, and to score
            it; it is as large as the base.
    """

    def __init__(
        self,
        *,
        title: str | None = None,
        max_windows: int | None = 64,
        short_context: int | None = None,
        near: int | None = None,
        far: int | None = None,
        merge: bool = False,
    ) -> None:
        super().__init__(
            title=title, max_windows=max_windows, short_context=short_context, near=near, far=far
        )
        self._merge = merge
        self._scores: dict[str, float] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the models, and writes the report."""
        if trainer.fast_dev_run:
            return
        was_training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            self._scores = self._compare(trainer, pl_module)
        pl_module.train(was_training)
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero and self._scores:
            print("\n".join(self._lines(trainer)))

    def _compare(self, trainer: L.Trainer, task: L.LightningModule) -> dict[str, float]:
        """Returns the bits per byte of the base, with its adapters, and of the merged model."""
        if not len(trainer.datamodule.val_dataloader()):
            return {}
        model = task.model
        with model.without_adapters():
            scores = {"base": self._score(trainer, model.base)}
        scores["adapter"] = self._score(trainer, model.base)
        if self._merge:
            folder = Path(trainer.default_root_dir)
            if trainer.is_global_zero:
                model.save_adapter(folder / "adapter")
                print(merge_adapter(adapter=str(folder / "adapter"), output=str(folder / "merged")))
            trainer.strategy.barrier()
            merged = load_merged(folder / "merged").to(task.device).eval()
            scores["merged"] = self._score(trainer, merged)
        return {f"bits_per_byte_{name}": score for name, score in scores.items()}

    def _score(self, trainer: L.Trainer, model: nn.Module) -> float:
        """Returns the bits per byte of the held-out windows that the report takes."""
        task, data, sums = trainer.lightning_module, trainer.datamodule, BitsPerByte()
        loader = data.val_dataloader()
        count = None if self._max_windows is None else max(1, self._max_windows // data.batch_size)
        for batch in islice(loader, count):
            batch = {name: value.to(task.device) for name, value in batch.items()}
            losses = token_losses(model, **batch, is_head_linear=task.model.is_head_linear)
            has_loss = batch["labels"] >= 0
            sums.update(
                nats=float(losses.double().sum()),
                num_tokens=int(has_loss.sum()),
                num_bytes=int((task.token_bytes[batch["labels"].clamp(min=0)] * has_loss).sum()),
            )
        sums.reduce(trainer.strategy)
        return sums.bits_per_byte

    def _metrics(self, trainer: L.Trainer, figures: ContextFigures) -> dict[str, float | None]:
        return {**super()._metrics(trainer, figures), **self._scores}

    def _lines(self, trainer: L.Trainer) -> list[str]:
        """Returns the comparison in words."""
        folder, base = Path(trainer.default_root_dir), self._scores["bits_per_byte_base"]
        places = {"adapter": folder / "adapter", "merged": folder / "merged"}
        lines = [f"Held-out bits per byte   base    {base:.4f}"]
        for name, place in places.items():
            score = self._scores.get(f"bits_per_byte_{name}")
            if score is not None:
                lines.append(f"{name:>32} {score:.4f}  {score - base:+.4f}  {place}")
        return lines
