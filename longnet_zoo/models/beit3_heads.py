"""Heads of BEiT-3, one small module for each task.

Masked modelling needs no module of its own: a linear layer to the visual tokens or the vocabulary.
Heads follow microsoft/unilm, `beit3/modeling_finetune.py`.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.ops.contrastive import contrastive_loss

from .beit3_config import BEiT3Config

__all__ = ["PatchClassifier", "RetrievalHead", "TokenClassifier", "make_classifier", "make_linear"]

_STD = 0.02
_TEMPERATURE = 0.07  # at the beginning, as in CLIP (arXiv 2103.00020)


def make_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Makes a linear layer of a head: normal weights of standard deviation 0.02, bias 0."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=_STD)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class TokenClassifier(nn.Module):
    """Classifies by the first token, as for questions about an image (`global_pool="token"`).

    Args:
        embed_dim: Channels in.
        num_classes: Number of classes.
        eps: Epsilon of the LayerNorms.
    """

    def __init__(self, *, embed_dim: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.pooler = make_linear(embed_dim, embed_dim)
        self.head = nn.Sequential(
            make_linear(embed_dim, 2 * embed_dim),
            nn.LayerNorm(2 * embed_dim, eps=eps),
            nn.GELU(),
            make_linear(2 * embed_dim, num_classes),
        )

    def forward(self, pooled: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Maps first tokens (b, e) to logits, or to what the last layers take, (b, e)."""
        x = self.pooler(self.norm(pooled)).tanh()
        return x if pre_logits else self.head(x)


class PatchClassifier(nn.Module):
    """Classifies by the mean over all patches, as for ImageNet (`global_pool="avg"`).

    Args:
        embed_dim: Channels in.
        num_classes: Number of classes.
        eps: Epsilon of the LayerNorm.
    """

    def __init__(self, *, embed_dim: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.head = make_linear(embed_dim, num_classes)

    def forward(self, pooled: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Maps means (b, e) to logits, or to what the last layer takes, (b, e)."""
        x = self.norm(pooled)
        return x if pre_logits else self.head(x)


class RetrievalHead(nn.Module):
    """Maps images and texts to one space, where a pair lies close together.

    The loss is made by the attribute `contrastive_loss_op`: replace it by a
    `ParallelContrastiveLoss` where several processes have pairs.

    Args:
        embed_dim: Channels in and out.
    """

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__()
        self.vision_head = make_linear(embed_dim, embed_dim, bias=False)
        self.language_head = make_linear(embed_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(_TEMPERATURE)))
        self.contrastive_loss_op = contrastive_loss

    def embed_image(self, first_token: Tensor) -> Tensor:
        """Maps class tokens (b, e) to embeddings of length 1, (b, e)."""
        return functional.normalize(self.vision_head(first_token), dim=-1)

    def embed_text(self, first_token: Tensor) -> Tensor:
        """Maps first text tokens (b, e) to embeddings of length 1, (b, e)."""
        return functional.normalize(self.language_head(first_token), dim=-1)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Computes the contrastive loss: row i of both is a pair, all others are not.

        Args:
            image: Embeddings of images, (b, e).
            text: Embeddings of texts, (b, e).

        Returns:
            Mean cross-entropy over both directions, a scalar.
        """
        return self.contrastive_loss_op(image, text, self.logit_scale.exp())


def make_classifier(config: BEiT3Config) -> TokenClassifier | PatchClassifier | None:
    """Makes the classification head that a config asks for."""
    if config.num_classes == 0:
        return None
    make = TokenClassifier if config.global_pool == "token" else PatchClassifier
    return make(embed_dim=config.embed_dim, num_classes=config.num_classes, eps=config.eps)
