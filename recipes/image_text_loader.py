"""Batches of images and captions, in an order that resumes anywhere.

A batch is a dict of `images` (b, 3, h, w) float32, `tokens` (b, t) int64, padded at the right to
the longest caption, `labels`, `image_ids` and `text_ids` (b,) int64, `names` and `captions`, lists
of b, and two counts: `num_skipped`, the pairs that could not be read for it, and `num_truncated`,
the captions that were cut to fit the model. Pairs with the same image id or the same text id show
or say the same, so in retrieval they count as each other's. What a pair looks like depends on seed,
epoch and the pair alone, so the number of worker processes changes nothing.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longnet_zoo.batch_tokenizer import BatchTokenizer

from .classification_metrics import UNLABELLED
from .image_files import no_pixel_limit
from .image_text_sources import Pairs
from .loader import Batch
from .sample_loader import SampleSource, Seed
from .seeding import seeded

__all__ = ["NO_PAIR", "LongCaptions", "PairEncoder", "collate_pairs", "pair_source"]

LongCaptions = Literal["truncate", "refuse"]
Sample = dict[str, Any]
Transform = Callable[[Image.Image], Tensor]

# Image and text id of what stands in for a pair that was not read.
NO_PAIR = -1


class PairEncoder:
    """Makes tensors of an image and its caption.

    Args:
        transform: Makes a tensor of an image.
        tokenizer: Makes ids of a caption.
        long_captions: "truncate" cuts a caption that is longer than the tokenizer allows, "refuse"
            raises, so that the pair counts as one that cannot be read.
    """

    def __init__(
        self, *, transform: Transform, tokenizer: BatchTokenizer, long_captions: LongCaptions
    ) -> None:
        self.tokenizer = tokenizer
        self._transform, self._long_captions = transform, long_captions

    def __call__(
        self,
        image: Image.Image,
        caption: str,
        *,
        name: str,
        label: int = UNLABELLED,
        seed: tuple[int, ...] = (0,),
    ) -> Sample:
        """Returns the sample of a pair.

        Args:
            image: The image, RGB.
            caption: What it shows.
            name: Name of the pair, for the error.
            label: Its class.
            seed: Seed of what the transform draws.

        Raises:
            ValueError: The caption is too long, and to be refused.
        """
        tokens, is_truncated = self._tokens(caption, name)
        with seeded(seed), no_pixel_limit():
            pixels = self._transform(image)
        return {
            "image": pixels,
            "tokens": tokens,
            "label": label,
            "image_id": _content_id(image.tobytes()),
            "text_id": _content_id(caption.encode(errors="replace")),
            "name": name,
            "caption": caption,
            "is_truncated": is_truncated,
        }

    def filler(self) -> Sample:
        """Returns a sample that stands in for one that was not read and counts for nothing."""
        sample = self(Image.new("RGB", (16, 16)), "", name="")
        return {**sample, "image_id": NO_PAIR, "text_id": NO_PAIR}

    def _tokens(self, caption: str, name: str) -> tuple[Tensor, bool]:
        tokenizer = self.tokenizer
        before = tokenizer.num_truncated
        with warnings.catch_warnings():
            # Batches count what is cut.
            warnings.filterwarnings("ignore", message=".* are longer than context_length")
            tokens = tokenizer(caption)[0]
        is_truncated = tokenizer.num_truncated > before
        if is_truncated and self._long_captions == "refuse":
            raise ValueError(
                f"a caption may have {tokenizer.context_length} tokens with its end, got "
                f"{len(caption.encode(errors='replace')):,} bytes of text for {name}. Use a model "
                "with a larger max_text_len, or pass --data.long_captions truncate."
            )
        return tokens, is_truncated


def pair_source(pairs: Pairs, encoder: PairEncoder) -> SampleSource[Sample]:
    """Returns pairs as loaders take them.

    Args:
        pairs: The pairs.
        encoder: Makes tensors of them.
    """
    return SampleSource(
        read=functools.partial(_read, pairs, encoder),
        collate=functools.partial(collate_pairs, pad_id=encoder.tokenizer.pad_id),
        filler=encoder.filler,
        num_samples=len(pairs.names),
        unit="pairs",
    )


def _read(pairs: Pairs, encoder: PairEncoder, place: int, seed: Seed) -> Sample:
    draws = None if seed is None else np.random.default_rng(seed)
    image, caption = pairs.read(place, generator=draws)
    return encoder(
        image,
        caption,
        name=pairs.names[place],
        label=pairs.labels[place],
        seed=(place,) if seed is None else seed,
    )


def collate_pairs(samples: Sequence[Sample], *, pad_id: int, num_skipped: int = 0) -> Batch:
    """Makes a batch of samples.

    Args:
        samples: What a `PairEncoder` returned.
        pad_id: Token id that fills up.
        num_skipped: Pairs that could not be read for this batch.
    """
    tokens = [sample["tokens"] for sample in samples]
    return {
        "images": torch.stack([sample["image"] for sample in samples]),
        "tokens": pad_sequence(tokens, batch_first=True, padding_value=pad_id),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "image_ids": torch.tensor([sample["image_id"] for sample in samples]),
        "text_ids": torch.tensor([sample["text_id"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
        "captions": [sample["caption"] for sample in samples],
        "num_skipped": torch.tensor(num_skipped),
        "num_truncated": torch.tensor(sum(sample["is_truncated"] for sample in samples)),
    }


def _content_id(content: bytes) -> int:
    """Returns a number of 63 bits that the same content shares, and no other."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
