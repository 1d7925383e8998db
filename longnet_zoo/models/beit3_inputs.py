"""What BEiT-3 makes of an image and of a text before its layers, and the checks of both.

Shape legend: b batch, p num_patches, t text_len, e embed_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longnet_zoo.ops.arguments import can_read

from .beit3_config import BEiT3Config
from .checks import check_mask, check_tokens

__all__ = [
    "FIRST_ROW",
    "ImageEmbedding",
    "TextEmbedding",
    "check_first_tokens",
    "check_inputs",
    "check_labels",
    "check_pairs",
    "image_part",
    "text_part",
]

# Rows 0 and 1 of a position table are never read: in torchscale position p takes row p + 2.
FIRST_ROW = 2


class ImageEmbedding(nn.Module):
    """Patches behind a class token, with positions; a mask token hides masked patches.

    Args:
        config: The options.
    """

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        embed_dim, patch_size = config.embed_dim, config.patch_size
        self.proj = nn.Conv2d(config.in_chans, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.positions = nn.Embedding(FIRST_ROW + 1 + config.num_patches, embed_dim)
        for weight in (self.cls_token, self.mask_token, self.positions.weight):
            nn.init.normal_(weight, std=embed_dim**-0.5)

    def forward(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """Embeds images (b, in_chans, img_size, img_size), masked by bool (b, p): (b, 1 + p, e)."""
        patches = self.proj(image.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        cls_token = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        return torch.cat([cls_token, patches], dim=1) + self.positions.weight[FIRST_ROW:]


class TextEmbedding(nn.Module):
    """Token embeddings with positions.

    Args:
        config: The options, with a `vocab_size`.
    """

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positions = nn.Embedding(FIRST_ROW + config.max_text_len, config.embed_dim)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=config.embed_dim**-0.5)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None, *, first: int = 0) -> Tensor:
        """Embeds tokens (b, t) of texts, from token `first` on: (b, t, e).

        Args:
            tokens: Token ids, (b, t).
            padding_mask: Bool (b, t), True = padding, whose embedding is zero.
            first: Place of the first token in its text.
        """
        rows = slice(FIRST_ROW + first, FIRST_ROW + first + tokens.shape[1])
        x = self.tokens(tokens) + self.positions.weight[rows]
        return x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0.0)


def check_inputs(
    config: BEiT3Config,
    image: Tensor | None,
    tokens: Tensor | None,
    text_padding_mask: Tensor | None,
    image_mask: Tensor | None,
) -> None:
    """Checks what `BEiT3.forward_features` takes, and raises what it says."""
    if image is None and tokens is None:
        raise ValueError("give image, tokens or both, got neither.")
    if image is not None:
        _check_image(config, image)
    if tokens is not None:
        _check_tokens(config, tokens)
        if image is not None:
            check_pairs(image, tokens)
    shape = None if tokens is None else tuple(tokens.shape)
    _check_given_mask("text_padding_mask", text_padding_mask, "tokens", shape)
    shape = None if image is None else (image.shape[0], config.num_patches)
    _check_given_mask("image_mask", image_mask, "image", shape)


def check_pairs(image: Tensor, tokens: Tensor) -> None:
    """Checks that there is a text for every image."""
    if image.shape[0] != tokens.shape[0]:
        raise ValueError(
            "image and tokens must have the same batch size, got "
            f"{image.shape[0]} images and {tokens.shape[0]} texts."
        )


def check_first_tokens(padding_mask: Tensor | None) -> None:
    """Checks that the first token of every text, which is pooled, is no padding."""
    # Reading values would stall a GPU.
    if padding_mask is None or padding_mask.device.type != "cpu" or not can_read(padding_mask):
        return
    wrong = padding_mask[:, 0].nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            "text_padding_mask must be False at the first token of every text, which stands for "
            f"the text, got True for texts {wrong}. Pad on the right, and leave empty texts out."
        )


def image_part(config: BEiT3Config, features: Tensor) -> Tensor:
    """Takes the features of the patches, (b, p, e)."""
    num_patches = config.num_patches
    if features.shape[1] <= num_patches:
        raise ValueError(
            f"features must begin with those of an image, 1 + {num_patches} tokens, got "
            f"{features.shape[1]} tokens."
        )
    return features[:, 1 : 1 + num_patches]


def text_part(config: BEiT3Config, features: Tensor, text_len: int) -> Tensor:
    """Takes the features of the text, (b, t, e)."""
    lengths = (text_len, 1 + config.num_patches + text_len)
    if features.shape[1] not in lengths:
        raise ValueError(
            f"features must be those of a text of text_len={text_len} tokens, {lengths[0]} tokens, "
            f"or {lengths[1]} behind an image, got {features.shape[1]} tokens."
        )
    return features[:, -text_len:]


def check_labels(name: str, labels: Tensor | None, what: str, labelled: Tensor | None) -> None:
    """Checks that labels come with what they label, and in its shape."""
    if labels is None:
        return
    if labelled is None:
        raise ValueError(f"{name} need {what}, got {what}=None.")
    if labels.shape != labelled.shape:
        raise ValueError(
            f"{name} must have the shape of {what}, {tuple(labelled.shape)}, got "
            f"{tuple(labels.shape)}."
        )


def _check_image(config: BEiT3Config, image: Tensor) -> None:
    if not image.is_floating_point():
        raise TypeError(
            f"image must be floating, got {image.dtype}. Scale and normalise the pixels first."
        )
    wanted = (config.in_chans, config.img_size, config.img_size)
    if image.ndim != 4 or image.shape[0] == 0 or tuple(image.shape[1:]) != wanted:
        raise ValueError(
            f"image must be (batch, in_chans, img_size, img_size) with {wanted}, got "
            f"{tuple(image.shape)}. Resize it, or create the model with another img_size: "
            "published positions are interpolated then."
        )


def _check_tokens(config: BEiT3Config, tokens: Tensor) -> None:
    if config.vocab_size is None:
        raise ValueError("tokens need a model with text weights, this one has vocab_size=None.")
    check_tokens(tokens, vocab_size=config.vocab_size, length="text_len")
    if tokens.shape[1] > config.max_text_len:
        raise ValueError(
            f"tokens must be at most max_text_len={config.max_text_len} per text, got "
            f"{tokens.shape[1]}. Create the model with a larger max_text_len."
        )


def _check_given_mask(
    name: str, mask: Tensor | None, what: str, shape: tuple[int, ...] | None
) -> None:
    if mask is None:
        return
    if shape is None:
        raise ValueError(f"{name} needs {what}, got {what}=None.")
    check_mask(name, mask, shape)
