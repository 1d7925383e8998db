"""A small multimodal model with every kind of modality, and inputs for it."""

import torch

from longnet_zoo.factory import create_model

PATTERN = {"segment_lengths": (7, 16), "dilation_rates": (1, 3)}
MODALITIES = (
    {"kind": "frames", "name": "video", "img_size": 8, "patch_size": 4, "frame_rate": 2.0},
    {
        "kind": "audio",
        "name": "sound",
        "sample_rate": 1000,
        "window_size": 64,
        "hop_size": 20,
        "num_mels": 8,
        "conv_strides": (2,),
    },
    {"kind": "text", "name": "question", "vocab_size": 61},
    {"kind": "features", "name": "tiles", "input_dim": 5, "num_layers": 0},
    {"kind": "image", "name": "photo", "img_size": 8, "patch_size": 4, "in_chans": 2},
)
NAMES = tuple(modality["name"] for modality in MODALITIES)
SMALL = {
    "modalities": tuple({**PATTERN, **modality} for modality in MODALITIES),
    "embed_dim": 24,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 31,
    "segment_lengths": (7, 16, 30),
    "dilation_rates": (1, 2, 3),
    "num_classes": 5,
}


def make(names=NAMES, **options):
    modalities = tuple(m for m in SMALL["modalities"] if m["name"] in names)
    options = {**SMALL, "modalities": modalities, **options}
    return create_model("longnet_multimodal_tiny", **options)


def draw(batch=3, length=9):
    return {
        "video": torch.randn(batch, 2 + length // 9, 3, 8, 8),
        "sound": 0.1 * torch.randn(batch, 40 * length - 7),
        "question": torch.randint(61, (batch, length)),
        "tiles": torch.randn(batch, length + 2, 5),
        "photo": torch.randn(batch, 2, 8, 12),
    }
