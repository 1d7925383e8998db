"""Options of the image-text model with two towers."""

from __future__ import annotations

from dataclasses import dataclass

from longnet_zoo.ops.contrastive import ContrastiveKind
from longnet_zoo.ops.pattern import DilatedPattern

from .checks import check_choices, check_integers
from .config import ZooConfig
from .longvit_config import LongViTConfig
from .text_encoder import LongNetMLMConfig

__all__ = ["LongNetCLIPConfig"]


@dataclass(frozen=True, kw_only=True)
class LongNetCLIPConfig(ZooConfig):
    """Options of `LongNetCLIP`.

    Attributes:
        image: The image tower, without a head: `num_classes=0`, `global_pool="avg"`.
        text: The text tower, without a head: `num_outputs=0`.
        output_dim: Channels of the space that images and texts are compared in.
        max_text_len: Tokens of the longest text, its end included.
        pad_id: Token id that fills texts up at the right.
        loss: "softmax" (CLIP) or "sigmoid" (SigLIP), which has a bias of the logits, too.
    """

    image: LongViTConfig
    text: LongNetMLMConfig
    output_dim: int
    max_text_len: int = 8192
    pad_id: int = 258
    loss: ContrastiveKind = "softmax"

    def __post_init__(self) -> None:
        for name, kind in (("image", LongViTConfig), ("text", LongNetMLMConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}.")
        check_integers(self, "output_dim", "max_text_len")
        check_integers(self, "pad_id", minimum=0)
        check_choices(self, "loss")
        if self.image.num_classes or self.image.global_pool != "avg":
            raise ValueError(
                "image must be a tower without a head, num_classes=0 and global_pool='avg', got "
                f"num_classes={self.image.num_classes} and global_pool={self.image.global_pool!r}."
            )
        if self.text.vocab_size is None or self.text.head_size:
            raise ValueError(
                "text must be a tower with a token embedding and without a head, num_outputs=0, "
                f"got vocab_size={self.text.vocab_size} and num_outputs={self.text.num_outputs}."
            )
        if self.pad_id >= self.text.vocab_size:
            raise ValueError(
                "pad_id must be a token id, below vocab_size of the text tower, got "
                f"pad_id={self.pad_id} and vocab_size={self.text.vocab_size}."
            )

    @property
    def pattern(self) -> DilatedPattern:
        """The attention pattern of the text tower."""
        return self.text.pattern

    @property
    def usual_seq_len(self) -> int:
        """Tokens of the longest text."""
        return self.max_text_len
