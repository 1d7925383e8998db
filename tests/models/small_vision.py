"""A small LongViT and images for it."""

import torch

from longnet_zoo.factory import create_model

CLASSES, EMBED_DIM, LAYERS, PATCH = 5, 24, 3, 4
# Awkward on purpose: no segment divides the 7 * 5 tokens, rates do not divide segments or heads.
SMALL = {
    "img_size": (28, 20),
    "patch_size": PATCH,
    "num_classes": CLASSES,
    "embed_dim": EMBED_DIM,
    "num_layers": LAYERS,
    "num_heads": 4,
    "ffn_dim": 40,
    "segment_lengths": (6, 13, 30),
    "dilation_rates": (1, 2, 3),
}


def make(name="longvit_tiny_patch8_64", **options):
    return create_model(name, **{**SMALL, **options})


def draw(batch=2, height=28, width=20):
    return torch.randn(batch, 3, height, width)
