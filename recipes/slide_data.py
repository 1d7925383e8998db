"""Slides for classification: the demonstration that comes with the recipe, or a folder of files."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from longnet_zoo.models.slide_config import GigaPathSlideConfig

from .data_options import check_fractions, check_least, check_on_error, loader_options
from .sample_loader import EvalLoader, TrainLoader
from .slide_demo import DEMO_CLASSES, DemoSlides, Split
from .slide_folder import load_folder, load_unlabelled
from .slide_loader import SlideSet, slide_source

__all__ = ["SlideDataModule"]


class SlideDataModule(L.LightningDataModule):
    """Serves bags of tile embeddings with coordinates; `slide_loader` says what a batch is.

    Args:
        source: "demo" (bags cut from the one slide that comes with the recipe), or a folder with a
            file of tile embeddings for each slide: .h5, .pt, .safetensors or .npz.
        labels: CSV file with the columns slide_id and label, for a folder; also split ("train",
            "val", "test") and patient_id if you have them.
        predict_source: Folder of slides that `predict` classifies; null takes the test slides.
        val_fraction: Share of the patients or slides held out for validation where the labels have
            no split.
        test_fraction: Share held out for the test where the labels have no split.
        on_error: "skip" logs slides that are missing or damaged, have another embedding size or
            coordinates that the encoder refuses, and goes on; "raise" stops at them. NaN among the
            tiles shows when a slide is first read, all else at the start.
        batch_size: Slides in a batch, on each device.
        max_tiles: Tiles to take of a slide in training, others in each epoch; null takes all.
        seed: Seed of the order and of the tiles.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: An option is out of range, or `labels` do not go with `source`.
    """

    def __init__(
        self,
        *,
        source: str = "demo",
        labels: str | None = None,
        predict_source: str | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        on_error: Literal["skip", "raise"] = "raise",
        batch_size: int = 1,
        max_tiles: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.labels, self.predict_source = source, labels, predict_source
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.on_error = on_error
        self.batch_size, self.max_tiles = batch_size, max_tiles
        self.seed, self.num_workers = seed, num_workers
        self._check()
        self.class_names: tuple[str, ...] | None = None
        self.input_dim: int | None = None
        self._slides: dict[Split, SlideSet] = {}

    @property
    def class_counts(self) -> list[int]:
        """Number of training slides of each class."""
        assert self.class_names is not None
        counts = Counter(self._slides["train"].labels)
        return [counts[label] for label in range(len(self.class_names))]

    @property
    def has_test(self) -> bool:
        """Whether slides are held out for the test."""
        return bool(self._slides["test"].labels)

    def setup(self, stage: str) -> None:
        """Finds the slides of all splits, once.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        # A folder to predict from may be all that there is.
        if self._slides or (stage == "predict" and self.predict_source is not None):
            return
        if self.source == "demo":
            self.class_names = DEMO_CLASSES
            self._slides = {split: DemoSlides(split) for split in ("train", "val", "test")}
        else:
            assert self.labels is not None
            self.class_names, slides = load_folder(
                self.source,
                labels=self.labels,
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                on_error=self.on_error,
                encoder=self._encoder(),
            )
            self._slides = dict(slides)
        self.input_dim = self._slides["train"].input_dim
        sizes = ", ".join(f"{split} {len(own.labels):,}" for split, own in self._slides.items())
        rank_zero_info(f"slides from {self.source!r}: {sizes}")

    def train_dataloader(self) -> TrainLoader:
        """Returns the training batches."""
        return TrainLoader(
            slide_source(self._slides["train"], max_tiles=self.max_tiles),
            seed=self.seed,
            repeat=0 if self.trainer is None else self.trainer.overfit_batches,
            **self._loader_options(),
        )

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Returns the validation batches; none if nothing is held out."""
        return self._eval_loader(self._slides["val"]) if self._slides["val"].labels else []

    def test_dataloader(self) -> EvalLoader:
        """Returns the test batches."""
        if not self.has_test:
            raise ValueError(
                f"the test needs slides, got none for it from {self.source!r} with test_fraction="
                f"{self.test_fraction}. Hold some out, or validate instead."
            )
        return self._eval_loader(self._slides["test"])

    def predict_dataloader(self) -> EvalLoader:
        """Returns the slides of `predict_source`."""
        if self.predict_source is None:
            return self.test_dataloader()
        slides = load_unlabelled(
            self.predict_source, on_error=self.on_error, encoder=self._encoder()
        )
        return self._eval_loader(slides)

    def sample_dataloader(self, max_slides: int) -> EvalLoader:
        """Returns training slides whole and in their order, for classifiers that need no epochs.

        Args:
            max_slides: How many to take at most, evenly spaced.
        """
        slides = self._slides["train"]
        number = len(slides.labels)
        kept = min(max_slides, number)
        return self._eval_loader(slides, places=[i * number // kept for i in range(kept)])

    def _eval_loader(self, slides: SlideSet, places: Sequence[int] | None = None) -> EvalLoader:
        places = range(len(slides.labels)) if places is None else places
        return EvalLoader(slide_source(slides), places=places, **self._loader_options())

    def _encoder(self) -> GigaPathSlideConfig | None:
        """Returns the config of the encoder that reads the slides, where there is a trainer."""
        return None if self.trainer is None else self.trainer.lightning_module.model.config

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "on_error": self.on_error,
            **loader_options(self),
        }

    def _check(self) -> None:
        check_least(
            batch_size=(self.batch_size, 1),
            max_tiles=(self.max_tiles, 1),
            seed=(self.seed, 0),
            num_workers=(self.num_workers, 0),
        )
        check_fractions(val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        check_on_error(self.on_error)
        if (self.source == "demo") != (self.labels is None):
            raise ValueError(
                "labels go with a folder of slides, and with nothing else, got source="
                f"{self.source!r} and labels={self.labels!r}."
            )
