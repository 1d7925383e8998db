r"""Trains an image-text model: pictures and sentences in one space.

    python -m recipes.image_text fit --config configs/image_text/quickstart.yaml
    python -m recipes.image_text test --config configs/image_text/quickstart.yaml
    python -m recipes.image_text predict --config configs/image_text/quickstart.yaml \
        --data.queries '["a bell", "arrow to the left"]'

Every option: `python -m recipes.image_text fit --help`. Shapes: b batch, n pairs, d channels.
"""

import dataclasses
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

import longnet_zoo as lz
from longnet_zoo.image_text import zero_shot_classifier
from longnet_zoo.layers import MemorySaving
from longnet_zoo.ops.contrastive import contrastive_loss
from longnet_zoo.parallel import ParallelContrastiveLoss
from recipes.callbacks import ExactResumption, SkippedSamples, Throughput
from recipes.checkpoints import check_checkpoint
from recipes.classification_metrics import UNLABELLED, log_counts
from recipes.classifiers import changed_options, check_modality
from recipes.cli import run
from recipes.figures import log_figure, pattern_figure
from recipes.image_text_data import ImageTextDataModule
from recipes.image_text_figures import find_pairs, retrieval_figure
from recipes.image_text_scores import Gallery, retrieval_scores
from recipes.optimization import OptimizationConfig, total_grad_norm
from recipes.run_folder import update_record
from recipes.trainer_batches import run_steps

__all__ = ["ImageTextMatcher", "main"]

# Rows of the similarities of held-out pairs whose losses exist at once.
_LOSS_ROWS = 1024
_NUM_QUERIES, _NUM_FOUND = 8, 5


class ImageTextMatcher(L.LightningModule):
    """A registered image-text model with its training, evaluation and search.

    Args:
        model_name: Name in the registry (`longnet-zoo list`).
        model_options: Options of `longnet_zoo.create_model` for it, such as `image.img_size`,
            `text.num_layers`, `output_dim` or `loss` ("softmax" or "sigmoid").
        pretrained: Weights to start from: true for the published ones, a tag of them, a file or a
            Hub id, as in `longnet_zoo.create_model`. Where a checkpoint is given, they are not
            read.
        optimization: Optimizer and learning rate, by optimizer step.
        loss_chunk_size: Pairs whose rows of logits exist at once in the loss; null takes all.
        memory_saving: How training saves memory, by computing again in the backward pass; null
            does not, which is fastest. See docs/memory.md.
    """

    def __init__(
        self,
        *,
        model_name: str = "longnet_clip_tiny",
        model_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        loss_chunk_size: int | None = None,
        memory_saving: MemorySaving | None = None,
    ) -> None:
        super().__init__()
        self.optimization = OptimizationConfig.of(optimization)
        if isinstance(memory_saving, dict):
            memory_saving = MemorySaving(**memory_saving)
        if loss_chunk_size is not None and loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size must be 1 or more, got {loss_chunk_size}.")
        self.loss_chunk_size = loss_chunk_size
        check_modality(model_name, "image-text", kind="an image-text model")
        self.model = lz.create_model(model_name, pretrained=pretrained, **(model_options or {}))
        self.model.set_memory_saving(memory_saving)
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "model_options": changed_options(self.model, model_name),
                "optimization": dataclasses.asdict(self.optimization),
                "loss_chunk_size": loss_chunk_size,
                "memory_saving": memory_saving and dataclasses.asdict(memory_saving),
            }
        )
        # Scores of the last evaluation of each split, and the features they were made of.
        self.scores: dict[str, dict[str, float]] = {}
        self.galleries: dict[str, Gallery] = {}
        self._parts: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._has_logged_pattern = False

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

    def setup(self, stage: str) -> None:
        """Compares each pair with those of all processes; refuses a folder without queries."""
        data = self.trainer.datamodule
        if stage == "predict" and data.predict_source is not None and not data.queries:
            raise ValueError(
                "images without captions are found by sentences, got predict_source="
                f"{data.predict_source!r} and queries={data.queries}. Pass data.queries."
            )
        if self.trainer.world_size > 1:
            self.model.contrastive_loss_op = ParallelContrastiveLoss(dist.group.WORLD)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Returns the contrastive loss; pairs with the same caption are no opposites."""
        return self.model.contrastive_loss(
            batch["images"],
            batch["tokens"],
            labels=batch["text_ids"],
            chunk_size=self.loss_chunk_size,
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        loss = self.loss(batch)
        self._losses.append(loss.detach())
        log_counts(self, "train", batch)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the step, which may have accumulated several batches."""
        self.log("train_loss", torch.stack(self._losses).mean(), sync_dist=True)
        self._losses.clear()
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))
        self.log("grad_norm", total_grad_norm(self.model))
        self.log("logit_scale", self.model.logit_scale.detach().exp())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Computes the features of a batch."""
        self._parts.append(self.embed(batch))
        log_counts(self, "val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Computes the features of a batch."""
        self._parts.append(self.embed(batch))
        log_counts(self, "test", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Computes the features of the images, and returns their names."""
        self._parts.append(self.embed(batch))
        return batch["names"]

    def on_validation_epoch_end(self) -> None:
        """Logs `val_loss`, `val_recall@5` and others of all validation pairs together."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test_loss`, `test_recall@5` and others of all test pairs together."""
        self._log_held_out("test")

    def on_predict_epoch_end(self) -> None:
        """Prints the images found for each query, and draws `queries.png`."""
        data, gallery = self.trainer.datamodule, self.collect()
        if len(gallery):
            loader = data.gallery_loader(is_shared=False)
            self.show(gallery, loader, queries=data.queries, name="queries")
        elif self.trainer.is_global_zero:
            print("Nothing to search: no image could be read.")

    def embed(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the fields of a `Gallery` for a batch."""
        return {
            "image_features": self.model.encode_image(batch["images"], normalize=True),
            "text_features": self.model.encode_text(batch["tokens"], normalize=True),
            **{name: batch[name] for name in ("image_ids", "text_ids", "labels")},
        }

    def collect(self, parts: list[dict[str, Tensor]] | None = None) -> Gallery:
        """Joins the batches of all processes; all must call this.

        Args:
            parts: What `embed` returned; None takes those of the epoch that ends.
        """
        if parts is None:
            parts, self._parts = self._parts, []
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.trainer.world_size > 1:
            joined = {name: self.all_gather(x).flatten(0, 1) for name, x in joined.items()}
        return Gallery(**joined).pairs()

    def score(self, gallery: Gallery) -> dict[str, float]:
        """Returns loss, recall in both directions and, if there are classes, zero-shot accuracy."""
        loss = contrastive_loss(
            gallery.image_features,
            gallery.text_features,
            self.model.scale().detach(),
            bias=self.model.logit_bias,
            kind=self.model.config.loss,
            labels=gallery.text_ids,
            chunk_size=min(_LOSS_ROWS, len(gallery)),
        )
        scores = {
            "loss": float(loss),
            **retrieval_scores(gallery.similarity, gallery.positives),
        }
        is_labelled = gallery.labels != UNLABELLED
        if is_labelled.any():
            data = self.trainer.datamodule
            classes = zero_shot_classifier(
                self.model, data.batch_tokenizer, data.class_names, data.prompts
            )
            guesses = (gallery.image_features[is_labelled] @ classes).argmax(1)
            is_right = guesses == gallery.labels[is_labelled]
            scores["zero_shot_accuracy"] = float(is_right.double().mean())
        return scores

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Returns the features of texts, (n, d), of length 1."""
        tokens = self.trainer.datamodule.batch_tokenizer(texts)
        return self.model.encode_text(tokens.to(self.device), normalize=True)

    def show(
        self, gallery: Gallery, loader: Any, *, name: str, queries: list[str] | None = None
    ) -> None:
        """Prints and draws the images that are most similar to some sentences.

        Args:
            gallery: Held-out pairs, or images to search.
            loader: Yields them to this process, in any order.
            name: Name of the picture.
            queries: The sentences; None takes captions of the gallery, as good as at random.
        """
        chosen = gallery.sample(0 if queries else _NUM_QUERIES)
        features = self.encode_texts(queries) if queries else gallery.text_features[chosen]
        if not self.trainer.is_global_zero:
            return
        similarity = features.float() @ gallery.image_features.float().T
        found = similarity.topk(min(_NUM_FOUND, len(gallery)), dim=1).indices
        wanted = gallery.keys(torch.cat([found.flatten(), chosen]))
        pairs = find_pairs(loader, wanted, pixels=self.trainer.datamodule.pixels)
        rows = [[pairs[key] for key in gallery.keys(row)] for row in found]
        marks = None
        if not queries:
            queries = [pairs[key].caption for key in gallery.keys(chosen)]
            marks = gallery.positives[:, chosen].T.gather(1, found).tolist()
        for query, row in zip(queries, rows, strict=True):
            print(f"{query}\t{', '.join(pair.name for pair in row)}")
        log_figure(self.trainer, name, retrieval_figure(queries, rows, is_right=marks))

    def progress_text(self, metrics: dict[str, float]) -> str:
        """Returns what a progress bar shows of the newest metrics."""
        parts = [f"train loss {metrics['train_loss']:.3f}"] if "train_loss" in metrics else []
        if "val_recall@5" in metrics:
            parts.append(f"val recall@5 {metrics['val_recall@5']:.1%}")
        if "pairs_per_second" in metrics:
            parts.append(f"{metrics['pairs_per_second']:,.0f} pairs/s")
        return "  ".join(parts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another model, and to resume with another optimizer.

        Raises:
            ValueError: The model or the optimizer differs; the message says in what.
        """
        check_checkpoint(self, checkpoint)

    def _log_held_out(self, split: str) -> None:
        gallery = self.collect()
        if self.trainer.sanity_checking or not len(gallery):
            return
        self.scores[split], self.galleries[split] = self.score(gallery), gallery
        for name, value in self.scores[split].items():
            # The same on all processes.
            self.log(f"{split}_{name}", value)
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        if not self._has_logged_pattern:
            self._has_logged_pattern = True
            log_figure(self.trainer, "pattern", pattern_figure(self.model.config.text))
        # A fit ends with a report, if it has one.
        if self.trainer.state.fn != "fit":
            metrics = {f"{split}_{name}": value for name, value in self.scores[split].items()}
            update_record(self.trainer.default_root_dir, metrics=metrics)


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(ImageTextMatcher, ImageTextDataModule, args=args)


if __name__ == "__main__":
    main()
