"""Pairs of images and captions: icons with their names, a table of files, or shards."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from longnet_zoo.batch_tokenizer import BatchTokenizer
from longnet_zoo.tokenizers import load_tokenizer

from .data_options import check_fractions, check_least, check_on_error, loader_options
from .icons import icon_fingerprint, load_icons, split_icons
from .image_text_loader import LongCaptions, PairEncoder, pair_source
from .image_text_shards import PairCollate, PairDecoder
from .image_text_sources import (
    ImageFolder,
    Pairs,
    Split,
    TableColumns,
    load_icon_pairs,
    load_table,
)
from .loader import EndlessLoader, FixedLoader, OnError, fair_order
from .sample_loader import EvalLoader, TrainLoader
from .shard_sources import HeldOutShardConfig, is_sharded, open_shards
from .shards import ShardEvalLoader, ShardLoader

__all__ = ["ImageTextDataModule"]

_CROP_SCALE = (0.9, 1.0)


class ImageTextDataModule(L.LightningDataModule):
    """Loads pairs in the size that the model asks for, and texts as its tokens.

    Args:
        source: "icons" (of the package qtawesome), or a `.csv` or `.jsonl` table of images and
            captions or the folder that holds one, or tar shards such as
            "data/train-{000000..000999}.tar", or `.parquet` files or "hub:NAME:SPLIT" of the
            Hugging Face Hub, which are streamed.
        columns: Columns of that table or dataset, or the key of the caption in a `.json` of a
            shard.
        shards: How shards are read.
        pages: Icons in a row of a page, and rows, for long captions and large images; 0 for
            images of one icon.
        queries: Sentences for which `predict` finds images; null takes some of the test captions.
        predict_source: Images that `predict` searches: a folder; null takes the test images.
        val_fraction: Share held out for validation where the table has no split.
        test_fraction: Share held out for the test where the table has no split.
        batch_size: Pairs in a batch, for each process. Each is told apart from all others.
        eval_batch_size: The same without training; null takes `batch_size`.
        tokenizer: "bytes", or a `tokenizer.json` with as many ids as the text tower has.
        long_captions: "truncate" cuts captions that are longer than the model's `max_text_len`
            and counts them; "refuse" takes such a pair for one that cannot be read.
        prompts: Sentences about a class for zero-shot classification, "{}" stands for its name.
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
        queries: list[str] | None = None,
        predict_source: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        tokenizer: str = "bytes",
        long_captions: LongCaptions = "truncate",
        prompts: Sequence[str] = ("{}",),
        crop_scale: tuple[float, float] | None = None,
        on_error: OnError = "skip",
        max_pixels: int = 2**28,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.columns, self.pages, self.shards = source, columns, pages, shards
        self.queries, self.predict_source = queries, predict_source
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.tokenizer, self.long_captions, self.prompts = tokenizer, long_captions, prompts
        self.crop_scale = crop_scale
        self.on_error, self.max_pixels = on_error, max_pixels
        self.seed, self.num_workers = seed, num_workers
        self._check()
        self.class_names: tuple[str, ...] = ()
        self._pairs: dict[Split, Pairs] = {}
        self._resolved: dict[str, Any] = {}
        self._batch_tokenizer: BatchTokenizer | None = None

    @property
    def batch_tokenizer(self) -> BatchTokenizer:
        """Makes tokens of texts, as the model reads them."""
        assert self._batch_tokenizer is not None
        return self._batch_tokenizer

    @property
    def has_test(self) -> bool:
        """Whether there are test pairs."""
        return self._is_held_out("test")

    def setup(self, stage: str, *, model: nn.Module | None = None) -> None:
        """Finds the pairs, and asks the model how it wants images and texts.

        Args:
            stage: "fit", "validate", "test" or "predict".
            model: The model, where there is no Trainer.

        Raises:
            ValueError: The model reads other images or other tokens.
        """
        if model is None:
            model = self.trainer.lightning_module.model
        self._resolved = resolve_data_config({}, model=model.visual)
        if self.source == "icons":
            # They are drawn in the size that is asked for.
            self._resolved["crop_pct"] = 1.0
        self._batch_tokenizer = self._make_tokenizer(model)
        # A folder to search may be all that there is.
        needs_pairs = stage != "predict" or self.predict_source is None
        if needs_pairs and not self._pairs and not is_sharded(self.source):
            self._load()

    def train_dataloader(self) -> EndlessLoader:
        """Returns the loader of training pairs."""
        options = {"batch_size": self.batch_size, "seed": self.seed, **self._loader_options()}
        if is_sharded(self.source):
            return ShardLoader(
                open_shards(self.source),
                self._decoder(is_training=True),
                collate=PairCollate(pad_id=self.batch_tokenizer.pad_id),
                batches_per_epoch=self.shards.batches_per_epoch,
                shuffle=self.shards.shuffle,
                **options,
            )
        repeat = 0 if self.trainer is None else self.trainer.overfit_batches
        encoder = self._encoder(is_training=True)
        source = pair_source(self._pairs["train"], encoder)
        return TrainLoader(source, repeat=repeat, **options)

    def val_dataloader(self) -> FixedLoader | list[Any]:
        """Returns the loader of validation pairs; nothing if none are held out."""
        return self.eval_loader("val") if self._is_held_out("val") else []

    def test_dataloader(self) -> FixedLoader:
        """Returns the loader of test pairs.

        Raises:
            ValueError: None are held out.
        """
        if not self.has_test:
            raise ValueError(
                f"the test needs pairs, got source={self.source!r} without any held out, "
                f"test_fraction={self.test_fraction} and shards.test={self.shards.test}. Set "
                "them, or validate instead."
            )
        return self.eval_loader("test")

    def predict_dataloader(self) -> FixedLoader:
        """Returns the loader of the images to search."""
        return self.gallery_loader()

    def eval_loader(
        self, split: Split, *, limit: int | None = None, is_shared: bool = True
    ) -> FixedLoader:
        """Returns a loader of the pairs of a split as they always look.

        Args:
            split: "train", "val" or "test".
            limit: Most pairs; None for all, of shards `shards.max_eval_samples`.
            is_shared: Whether all processes share the pairs; else this one gets them all.
        """
        if not is_sharded(self.source):
            pairs = self._pairs[split]
            places = fair_order(len(pairs.names))[:limit]
            return self._pair_loader(pairs, is_shared=is_shared, places=places)
        decoder = self._decoder(is_training=False)
        return ShardEvalLoader(
            open_shards(self.source if split == "train" else getattr(self.shards, split)),
            decoder,
            filler=decoder.encoder.filler(),
            collate=PairCollate(pad_id=self.batch_tokenizer.pad_id),
            batch_size=self.eval_batch_size or self.batch_size,
            max_samples=limit or self.shards.max_eval_samples,
            **self._loader_options(is_shared=is_shared),
        )

    def gallery_loader(self, *, is_shared: bool = True) -> FixedLoader:
        """Returns a loader of the images that `predict` searches; see `eval_loader`."""
        if self.predict_source is None:
            return self.eval_loader("test", is_shared=is_shared)
        folder = ImageFolder(self.predict_source, max_pixels=self.max_pixels)
        return self._pair_loader(folder, is_shared=is_shared)

    def pixels(self, images: Tensor) -> Tensor:
        """Makes pictures to look at, (b, h, w, 3) in [0, 1], of the images of a batch."""
        mean, std = (torch.tensor(self._resolved[name])[:, None, None] for name in ("mean", "std"))
        return (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)

    def _is_held_out(self, split: Split) -> bool:
        if is_sharded(self.source):
            return getattr(self.shards, split) is not None
        return bool(self._pairs[split].names)

    def _load(self) -> None:
        fractions = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        fingerprint = ""
        if self.source == "icons":
            size = self._icon_size()
            self.class_names, self._pairs = load_icon_pairs(
                size=size, pages=self.pages, **fractions
            )
            found = icon_fingerprint(split_icons(load_icons(), **fractions))
            fingerprint = f", fingerprint {found}"
        else:
            self.class_names, self._pairs = load_table(
                self.source, columns=self.columns, max_pixels=self.max_pixels, **fractions
            )
        if not self._pairs["train"].names:
            raise ValueError(
                f"training needs pairs, got none in {self.source!r} outside of validation and "
                f"test, with val_fraction={self.val_fraction} and test_fraction="
                f"{self.test_fraction}. Lower them, or add pairs."
            )
        sizes = ", ".join(f"{split} {len(own.names):,}" for split, own in self._pairs.items())
        rank_zero_info(f"pairs from {self.source!r}: {sizes}{fingerprint}")

    def _icon_size(self) -> int:
        height, width = self._resolved["input_size"][1:]
        if height != width:
            raise ValueError(
                f"icons are square, got a model for images of {height} x {width} "
                "pixels. Pass a square image.img_size."
            )
        return height

    def _make_tokenizer(self, model: nn.Module) -> BatchTokenizer:
        config = model.config
        made = BatchTokenizer(load_tokenizer(self.tokenizer), context_length=config.max_text_len)
        if made.vocab_size > config.text.vocab_size or made.pad_id != config.pad_id:
            raise ValueError(
                "the text tower must know the ids of the tokenizer, got a tokenizer with "
                f"{made.vocab_size} ids and padding {made.pad_id}, and a model with "
                f"text.vocab_size={config.text.vocab_size} and pad_id={config.pad_id}. Set "
                "model.model_options to those of the tokenizer."
            )
        return made

    def _pair_loader(
        self, pairs: Pairs, *, is_shared: bool, places: Sequence[int] | None = None
    ) -> EvalLoader:
        # The captions of a folder are paths, of any length.
        long_captions = "truncate" if isinstance(pairs, ImageFolder) else self.long_captions
        return EvalLoader(
            pair_source(pairs, self._encoder(is_training=False, long_captions=long_captions)),
            batch_size=self.eval_batch_size or self.batch_size,
            places=places,
            **self._loader_options(is_shared=is_shared),
        )

    def _decoder(self, *, is_training: bool) -> PairDecoder:
        return PairDecoder(
            encoder=self._encoder(is_training=is_training),
            columns=self.columns,
            max_pixels=self.max_pixels,
            is_training=is_training,
        )

    def _encoder(
        self, *, is_training: bool, long_captions: LongCaptions | None = None
    ) -> PairEncoder:
        crop: dict[str, Any] = {}
        if is_training and self.source != "icons":
            crop = {"scale": self.crop_scale or _CROP_SCALE, "ratio": (1.0, 1.0), "hflip": 0.0}
            crop |= {"is_training": True, "color_jitter": None}
        return PairEncoder(
            transform=create_transform(**self._resolved, **crop),
            tokenizer=self.batch_tokenizer,
            long_captions=long_captions or self.long_captions,
        )

    def _loader_options(self, *, is_shared: bool = True) -> dict[str, Any]:
        return {"on_error": self.on_error, **loader_options(self, is_shared=is_shared)}

    def _check(self) -> None:
        check_fractions(val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        check_least(
            batch_size=(self.batch_size, 2),
            eval_batch_size=(self.eval_batch_size, 1),
            pages=(self.pages, 0),
            max_pixels=(self.max_pixels, 1),
            num_workers=(self.num_workers, 0),
            seed=(self.seed, 0),
        )
        check_on_error(self.on_error)
        if self.long_captions not in ("truncate", "refuse"):
            raise ValueError(
                f"long_captions must be 'truncate' or 'refuse', got {self.long_captions!r}."
            )
        if self.queries is not None and not all(query.strip() for query in self.queries):
            raise ValueError(f"queries must not be blank, got {self.queries}.")
        if not self.prompts or not all("{}" in prompt for prompt in self.prompts):
            raise ValueError(f"prompts must hold {{}} for the class, got {list(self.prompts)}.")
        if self.crop_scale is not None:
            low, high = self.crop_scale
            if self.source == "icons" or not 0 < low <= high <= 1:
                raise ValueError(
                    "crop_scale must be two numbers, 0 < low <= high <= 1, and null for icons, "
                    f"which vary by themselves, got {(low, high)} and source={self.source!r}."
                )
        if not is_sharded(self.source) and (self.shards.val or self.shards.test):
            raise ValueError(
                "shards.val and shards.test go with a source of shards, got "
                f"{self.shards.val!r}, {self.shards.test!r} and source={self.source!r}."
            )
        if self.source != "icons" and self.pages:
            raise ValueError(
                f"pages are made of icons, got pages={self.pages} and {self.source!r}."
            )
