"""The options of BEiT-3, checked, and its released weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from longnet_zoo.ops.pattern import DENSE_SEGMENT
from longnet_zoo.registry import PublishedWeights

from .checks import check_choices, check_flags, check_integers
from .config import ModelConfig

__all__ = ["BEiT3Config", "GlobalPool", "TrainingHead", "published_weights"]

GlobalPool = Literal["token", "avg"]
TrainingHead = Literal["masked_image", "masked_text", "retrieval"]

_RELEASE = "https://github.com/addf400/files/releases/download/beit3"


@dataclass(frozen=True, kw_only=True)
class BEiT3Config(ModelConfig):
    """Options of `BEiT3`; the defaults are those of the published base model.

    Attributes:
        img_size: Height and width of an image in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch in pixels.
        in_chans: Channels of an image.
        vocab_size: Number of token ids; None for a model of images alone, which has neither token
            embeddings nor a second set of weights in its layers.
        max_text_len: Most tokens of a text; the table of positions has two more rows.
        num_visual_tokens: Classes of a masked patch, for the head "masked_image".
        heads: Heads to train with: any of "masked_image", "masked_text" and "retrieval".
        num_classes: Classes of the classification head; 0: no such head.
        global_pool: What is classified: "token", the first token, as for questions about an image,
            or "avg", the mean over the patches.
        final_norm: Whether features pass a last LayerNorm. Published classification models have
            none, since their heads begin with one; all others have it.
        embed_dim: As for `ModelConfig`, like all fields that are not in this list.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    vocab_size: int | None = 64010
    max_text_len: int = 1022
    num_visual_tokens: int = 8192
    heads: tuple[TrainingHead, ...] = ()
    num_classes: int = 0
    global_pool: GlobalPool = "token"
    final_norm: bool = True
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    segment_lengths: tuple[int, ...] = (DENSE_SEGMENT,)
    dilation_rates: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        check_integers(self, "img_size", "patch_size", "in_chans", "max_text_len")
        check_integers(self, "num_visual_tokens")
        check_integers(self, "vocab_size", optional=True)
        check_integers(self, "num_classes", minimum=0)
        check_choices(self, "global_pool")
        check_flags(self, "final_norm")
        if self.img_size % self.patch_size:
            raise ValueError(
                "img_size must be a multiple of patch_size, got "
                f"img_size={self.img_size} and patch_size={self.patch_size}."
            )
        self._check_heads()
        super().__post_init__()

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_modalities(self) -> int:
        """Sets of weights in every layer: for images, and for texts if there are any."""
        return 1 if self.vocab_size is None else 2

    @property
    def usual_seq_len(self) -> int:
        """The tokens of an image without a text."""
        return 1 + self.num_patches

    def _check_heads(self) -> None:
        known = get_args(TrainingHead)
        if isinstance(self.heads, list):
            object.__setattr__(self, "heads", tuple(self.heads))
        if not isinstance(self.heads, tuple) or len({*self.heads} & {*known}) < len(self.heads):
            raise ValueError(
                f"heads must be a tuple of different names among {known}, got {self.heads!r}."
            )
        if self.vocab_size is None and {"masked_text", "retrieval"} & {*self.heads}:
            raise ValueError(
                "the heads 'masked_text' and 'retrieval' need texts, got "
                f"heads={self.heads} with vocab_size=None."
            )


def published_weights(size: str) -> tuple[PublishedWeights, ...]:
    """Lists the released weights of a size, "base" or "large", whose outputs `BEiT3` computes.

    Files and what they were trained on: microsoft/unilm, `beit3/README.md`, `beit3/get_started/`,
    `beit3/datasets.py`.
    """
    publish = partial(_published, size)
    masked = "heads=('masked_image', 'masked_text') keeps its heads"
    retrieval = {"img_size": 384, "heads": ("retrieval",)}
    answers = {"img_size": 480, "num_classes": 3129, "final_norm": False}
    imagenet = {"num_classes": 1000, "global_pool": "avg", "vocab_size": None, "final_norm": False}
    return (
        publish("pretrained", "patch16_224", note=masked),
        publish("itc", "itc_patch16_224", note="contrastive: heads=('retrieval',) keeps its head"),
        publish("indomain", "indomain_patch16_224", note=f"COCO and VG added; {masked}"),
        publish("in1k", "patch16_224_in1k", imagenet, pixels="ImageNet's mean and std"),
        publish("vqa", "patch16_480_vqa", answers),
        publish("coco_retrieval", "patch16_384_coco_retrieval", retrieval),
        publish("f30k_retrieval", "patch16_384_f30k_retrieval", retrieval),
    )


def _published(
    size: str,
    tag: str,
    file: str,
    options: dict[str, Any] | None = None,
    *,
    pixels: str = "mean 0.5 and std 0.5",
    note: str = "",
) -> PublishedWeights:
    return PublishedWeights(
        tag=tag,
        location=f"{_RELEASE}/beit3_{size}_{file}.pth",
        licence="MIT",
        options=options or {},
        note="; ".join(filter(None, (f"normalise pixels by {pixels}", note))),
    )
