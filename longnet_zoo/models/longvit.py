"""LongViT (arXiv 2312.03558): a Vision Transformer with dilated attention, for gigapixel images.

Patch embedding, learned absolute positions, a LongNet encoder without a final norm, and for a
classifier the mean of all tokens, a LayerNorm and a linear head; there is no class token. Sizes at
the foot of the file are those of microsoft/torchscale, `examples/longvit`.

Shape legend: b batch, n patches in row-major order, e embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from longnet_zoo.registry import PublishedWeights, register_model

from .heads import fit_module, masked_mean
from .longvit_config import LongViTConfig
from .patch_encoder import PatchEncoder, block_numbers, init_weight

__all__ = [
    "LongViT",
    "LongViTConfig",
    "longvit_small_patch32_1024",
    "longvit_small_patch32_4096",
    "longvit_small_patch32_8192",
    "longvit_small_patch32_16384",
    "longvit_small_patch32_32768",
    "longvit_tiny_patch8_64",
]


class LongViT(PatchEncoder):
    """Vision Transformer with dilated attention over the patches of an image.

    It has timm's methods, and two more for images that do not fit in memory: `embed_pixels` makes
    tokens from lazily read pixels, `forward_tokens` makes features from tokens.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.

    Example:
        >>> model = longnet_zoo.create_model("longvit_tiny_patch8_64", num_classes=10)
        >>> logits = model(torch.randn(2, 3, 64, 64))
    """

    def __init__(self, config: LongViTConfig) -> None:
        super().__init__(config)
        self.head_hidden_size = config.embed_dim
        self.fc_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(config.head_dropout)
        self.reset_classifier(config.num_classes)

    @property
    def num_classes(self) -> int:
        """Outputs of the head."""
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.config.in_chans

    @property
    def global_pool(self) -> str:
        """How tokens become one vector."""
        return self.config.global_pool

    def forward(self, images: Tensor) -> Tensor:
        """Computes logits, or pooled features for a model without a head.

        Args:
            images: Normalised images, (batch, in_chans, height, width), of whole patches.

        Returns:
            (batch, num_classes), or (batch, embed_dim) without a head; with `global_pool=""` the
            same for every token, (batch, patches, ...).

        Raises:
            ValueError: If the images have other channels or no whole patches.
            TypeError: If they are not of a floating dtype.
        """
        return self.forward_head(self.forward_features(images))

    def forward_head(
        self, features: Tensor, pre_logits: bool = False, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Pools features (batch, patches, embed_dim) and classifies them.

        Args:
            features: What `forward_features` or `forward_tokens` returns.
            pre_logits: Whether to return what the head would get.
            key_padding_mask: As for `forward_tokens`; padding is left out of the mean.

        Returns:
            As for `forward`.
        """
        if self.config.global_pool == "avg":
            features = masked_mean(features, key_padding_mask)
        features = self.head_drop(self.fc_norm(features))
        return features if pre_logits else self.head(features)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the blocks after the last one wanted, and if asked the final norm and the head.

        Args:
            indices: As for `forward_intermediates`.
            prune_norm: Whether to remove the final norm.
            prune_head: Whether to remove the head and the pooling.

        Returns:
            The numbers of the blocks wanted.
        """
        taken = block_numbers(indices, len(self.stack.blocks))
        self.stack.blocks = self.stack.blocks[: max(taken) + 1]
        self.config = replace(self.config, num_layers=len(self.stack.blocks))
        if prune_norm:
            self.norm = nn.Identity()
            self.config = replace(self.config, final_norm=False)
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """Returns the head, an `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one.

        Args:
            num_classes: Outputs; 0 removes the head and its norm.
            global_pool: "avg" or ""; None: as it is.

        Raises:
            ValueError: If `num_classes` is negative or `global_pool` unknown.
            TypeError: If `num_classes` is not an integer.
        """
        pool: Any = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        self._describe_data()
        if num_classes == 0:
            self.fc_norm, self.head = nn.Identity(), nn.Identity()
            return
        head = nn.Linear(self.embed_dim, num_classes)
        init_weight(head.weight)
        nn.init.zeros_(head.bias)
        self.head = fit_module(head, self)
        if isinstance(self.fc_norm, nn.Identity):
            norm = nn.LayerNorm(self.embed_dim, eps=self.config.eps)
            self.fc_norm = fit_module(norm, self)

    def flops(self, seq_len: int) -> int:
        """Counts the FLOPs for one image, patch embedding and head included; see `ZooModel`.

        Args:
            seq_len: Number of patches.
        """
        patches = 2 * self.patch_embed.proj.weight.numel() * seq_len
        return super().flops(seq_len) + patches + 2 * self.embed_dim * self.num_classes


_DINO = PublishedWeights(
    tag="dino_tcga",
    location="https://github.com/wenhui0924/longvit_ckpts/releases/download/longvit/"
    "longvit_small_patch32_1024.pth",
    licence="MIT",
    note="DINO teacher on slides of TCGA at 1,024 px; other image sizes resize its positions",
)
_TORCHSCALE = "arXiv 2312.03558; microsoft/torchscale, examples/longvit"
_register = partial(register_model, family="longvit", modality="vision")
_register_small = partial(_register, source=_TORCHSCALE, weights=(_DINO,))


def _small(img_size: int, segment_lengths: tuple[int, ...]) -> LongViTConfig:
    return LongViTConfig(
        img_size=img_size,
        patch_size=32,
        embed_dim=384,
        num_layers=12,
        num_heads=16,
        segment_lengths=segment_lengths,
        dilation_rates=(1, 2, 4, 8, 16),
    )


@_register(
    "longvit_tiny_patch8_64",
    config=LongViTConfig(
        img_size=64,
        patch_size=8,
        embed_dim=128,
        num_layers=6,
        num_heads=4,
        segment_lengths=(16, 32, 64),
        dilation_rates=(1, 2, 4),
    ),
    description="LongViT for small images, for laptops",
    source="this project",
)
def longvit_tiny_patch8_64(config: LongViTConfig) -> LongViT:
    """Builds a model of 1.2M parameters."""
    return LongViT(config)


@_register_small(
    "longvit_small_patch32_1024",
    config=_small(1024, (64, 128, 256, 512, 1024)),
    description="LongViT for images of 1,024 px, 1,024 tokens",
)
def longvit_small_patch32_1024(config: LongViTConfig) -> LongViT:
    """Builds the published model for images of 1,024 px."""
    return LongViT(config)


@_register_small(
    "longvit_small_patch32_4096",
    config=_small(4096, (1024, 2048, 4096, 8192, 16384)),
    description="LongViT for images of 4,096 px, 16,384 tokens",
)
def longvit_small_patch32_4096(config: LongViTConfig) -> LongViT:
    """Builds the published model for images of 4,096 px."""
    return LongViT(config)


@_register_small(
    "longvit_small_patch32_8192",
    config=_small(8192, (1024, 4096, 8192, 16384, 65536)),
    description="LongViT for images of 8,192 px, 65,536 tokens",
)
def longvit_small_patch32_8192(config: LongViTConfig) -> LongViT:
    """Builds the published model for images of 8,192 px."""
    return LongViT(config)


@_register_small(
    "longvit_small_patch32_16384",
    config=_small(16384, (1024, 4096, 16384, 65536, 262144)),
    description="LongViT for images of 16,384 px, 262,144 tokens",
)
def longvit_small_patch32_16384(config: LongViTConfig) -> LongViT:
    """Builds the published model for images of 16,384 px."""
    return LongViT(config)


@_register_small(
    "longvit_small_patch32_32768",
    config=_small(32768, (1024, 4096, 32768, 262144, 1048576)),
    description="LongViT for images of 32,768 px, 1,048,576 tokens",
)
def longvit_small_patch32_32768(config: LongViTConfig) -> LongViT:
    """Builds the published model for images of 32,768 px."""
    return LongViT(config)
