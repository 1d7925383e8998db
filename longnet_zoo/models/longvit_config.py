"""Options of LongViT, and how its images must be prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .checks import check_choices, check_flags, check_integers, check_probabilities
from .config import ModelConfig

__all__ = ["LongViTConfig", "data_config"]


@dataclass(frozen=True, kw_only=True)
class LongViTConfig(ModelConfig):
    """Options of `LongViT`, besides those of every stack.

    Attributes:
        img_size: Pixels, (height, width) or one number for both: the grid of the position table.
            Images of other sizes work too, with the table interpolated.
        patch_size: Side of a patch in pixels, a divisor of both.
        in_chans: Channels of an image.
        num_classes: Outputs of the head; 0: neither head nor its norm, as published.
        global_pool: "avg" (mean of the tokens) or "" (features and logits for every token).
        final_norm: Whether a LayerNorm follows the last block. DINO pretraining has it, and its
            features are the mean of the tokens after it; published fine-tuning drops it.
        head_dropout: Dropout before the head.
    """

    img_size: int | tuple[int, int]
    patch_size: int
    in_chans: int = 3
    num_classes: int = 0
    global_pool: Literal["avg", ""] = "avg"
    final_norm: bool = False
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "patch_size", "in_chans")
        check_integers(self, "num_classes", minimum=0)
        check_choices(self, "global_pool")
        check_flags(self, "final_norm")
        check_probabilities(self, "head_dropout")
        object.__setattr__(self, "img_size", _image_size(self.img_size, self.patch_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of `img_size`."""
        height, width = _image_size(self.img_size, self.patch_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def usual_seq_len(self) -> int:
        """Patches of an image of `img_size`."""
        return self.grid[0] * self.grid[1]


def data_config(config: LongViTConfig) -> dict[str, Any]:
    """Describes the images of a model in the fields of timm's `PretrainedCfg`.

    Slides were resized to a square without regard to their shape, bicubically, and normalised with
    ImageNet's mean and standard deviation (torchscale, `examples/longvit`:
    `data_preprocessing/convert_wsi_to_images.py`, `datasets.py`).
    """
    assert isinstance(config.img_size, tuple)
    return {
        "input_size": (config.in_chans, *config.img_size),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": config.num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _image_size(img_size: object, patch_size: int) -> tuple[int, int]:
    """Checks an image size, and makes it (height, width)."""
    sides = (img_size, img_size) if type(img_size) is int else img_size
    if not isinstance(sides, (tuple, list)) or [type(side) for side in sides] != [int, int]:
        raise TypeError(f"img_size must be an integer or two, (height, width), got {img_size!r}.")
    height, width = sides
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"img_size must be made of whole patches of patch_size={patch_size}, got {img_size!r}."
        )
    return height, width
