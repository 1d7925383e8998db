"""A small image-text model, and pairs for it."""

import torch

from longnet_zoo.factory import create_model

from . import small_vision

OUTPUT_DIM, MAX_TEXT_LEN, PAD_ID = 10, 40, 258
SMALL = {
    "image": {**small_vision.SMALL, "num_classes": 0, "num_layers": 2},
    "text": {
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 40,
        "segment_lengths": (5, 12, 30),
        "dilation_rates": (1, 2, 3),
    },
    "output_dim": OUTPUT_DIM,
    "max_text_len": MAX_TEXT_LEN,
}


def make(name="longnet_clip_tiny", **options):
    return create_model(name, **{**SMALL, **options})


def draw(batch=3, seq_len=31):
    """Images and texts of different lengths; the longest has no padding."""
    tokens = torch.randint(256, (batch, seq_len))
    for i in range(1, batch):
        tokens[i, seq_len - 9 * i % seq_len :] = PAD_ID
    return small_vision.draw(batch), tokens
