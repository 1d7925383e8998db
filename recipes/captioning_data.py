"""Images and captions for a model that writes: icons, a table of files, or shards.

As in `image_text_data`, but held-out icons are drawn as in training, with colours, each always the
same.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from timm.data import resolve_data_config
from torch import nn

from longnet_zoo.batch_tokenizer import BatchTokenizer
from longnet_zoo.tokenizers import load_tokenizer

from .icons import COLOURS, STYLE_WORDS
from .image_text_data import ImageTextDataModule
from .image_text_loader import LongCaptions
from .image_text_sources import ImageFolder, Pairs, Split, TableColumns
from .loader import FixedLoader, OnError
from .shard_sources import HeldOutShardConfig, is_sharded

__all__ = ["CaptionDataModule", "DrawnPairs"]


class CaptionDataModule(ImageTextDataModule):
    """Loads pairs in the size that the model asks for, and captions as its tokens.

    Args:
        source: "icons" (of the package qtawesome), a `.csv` or `.jsonl` table of images and
            captions or the folder that holds one, or tar shards such as
            "data/train-{000000..000999}.tar", or `.parquet` files or "hub:NAME:SPLIT" of the
            Hugging Face Hub, which are streamed.
        columns: Columns of that table or dataset, or the key of the caption in a `.json` of a
            shard.
        shards: How shards are read.
        pages: Icons in a row of a page, and rows, for long captions; 0 for images of one icon.
        predict_source: Images for which `predict` writes captions: a folder or one image; null
            takes the test images.
        val_fraction: Share held out for validation where the table has no split.
        test_fraction: Share held out for the test where the table has no split.
        batch_size: Pairs in a batch, for each process; 2 or more.
        eval_batch_size: The same without training; null takes `batch_size`.
        tokenizer: "bytes", or a `tokenizer.json` with at most as many ids as the model has.
        long_captions: "truncate" cuts captions that are longer than the model's `max_text_len`
            and counts them; "refuse" takes such a pair for one that cannot be read.
        crop_scale: Least and greatest share of its area that a random crop of a training image
            keeps; null takes 0.9 and 1. Icons vary by themselves. Nothing is mirrored, since
            captions say left and right.
        on_error: "skip" logs pairs that cannot be read, and goes on; "raise" stops at them.
        max_pixels: An image with more is not read, against files that would fill the memory.
        seed: Seed of order and augmentation.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        source: str = "icons",
        columns: TableColumns = TableColumns(),  # noqa: B008 - frozen
        shards: HeldOutShardConfig = HeldOutShardConfig(),  # noqa: B008 - frozen
        pages: int = 0,
        predict_source: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        tokenizer: str = "bytes",
        long_captions: LongCaptions = "truncate",
        crop_scale: tuple[float, float] | None = None,
        on_error: OnError = "skip",
        max_pixels: int = 2**28,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            source=source,
            columns=columns,
            shards=shards,
            pages=pages,
            predict_source=predict_source,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            tokenizer=tokenizer,
            long_captions=long_captions,
            crop_scale=crop_scale,
            on_error=on_error,
            max_pixels=max_pixels,
            seed=seed,
            num_workers=num_workers,
        )

    @property
    def word_groups(self) -> Mapping[str, frozenset[str]]:
        """Words by what they tell, whose share of right ones is worth a figure of its own."""
        if self.source != "icons" or self.pages:
            return {}
        return {"colour": frozenset(COLOURS), "style": STYLE_WORDS}

    def setup(self, stage: str, *, model: nn.Module | None = None) -> None:
        """Finds the pairs, and asks the model how it wants images and texts.

        Args:
            stage: "fit", "validate", "test" or "predict".
            model: The model, where there is no Trainer.

        Raises:
            ValueError: The model has fewer ids than the tokenizer, or there are no pairs.
        """
        model = self.trainer.lightning_module.model if model is None else model
        self._resolved = resolve_data_config({}, model=model)
        self._batch_tokenizer = self._make_tokenizer(model)
        # A folder to write about may be all that there is.
        needs_pairs = stage != "predict" or self.predict_source is None
        if needs_pairs and not self._pairs and not is_sharded(self.source):
            self._load()

    def predict_dataloader(self) -> FixedLoader:
        """Returns the loader of the images to write about, in the order of their names."""
        if self.predict_source is None:
            return self.test_dataloader()
        folder = ImageFolder(self.predict_source, max_pixels=self.max_pixels)
        return self._pair_loader(folder, is_shared=True, places=range(len(folder.names)))

    def _load(self) -> None:
        super()._load()
        if self.source == "icons":
            held_out: tuple[Split, ...] = ("val", "test")
            self._pairs |= {split: DrawnPairs(pairs=self._pairs[split]) for split in held_out}

    def _make_tokenizer(self, model: nn.Module) -> BatchTokenizer:
        config = model.config
        made = BatchTokenizer(load_tokenizer(self.tokenizer), context_length=config.max_text_len)
        if made.vocab_size > (config.vocab_size or 0):
            raise ValueError(
                "the model must have every id of the tokenizer, got vocab_size="
                f"{config.vocab_size} and a tokenizer with {made.vocab_size} ids. Set "
                f"model.model_options.vocab_size to {made.vocab_size}."
            )
        return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnPairs:
    """Pairs that look as in training, but each always the same.

    Attributes:
        pairs: The pairs.
    """

    pairs: Pairs

    @property
    def names(self) -> Sequence[str]:
        """Names of the pairs."""
        return self.pairs.names

    @property
    def labels(self) -> Sequence[int]:
        """Classes of the pairs."""
        return self.pairs.labels

    def read(
        self, place: int, *, generator: np.random.Generator | None = None
    ) -> tuple[Image.Image, str]:
        """Returns image and caption of a pair."""
        draws = np.random.default_rng((0, place)) if generator is None else generator
        return self.pairs.read(place, generator=draws)
