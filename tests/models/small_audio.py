"""A small audio model with sizes that divide nothing, and sound for it."""

import torch
from torch import Tensor

from longnet_zoo.factory import create_model
from longnet_zoo.models import LongNetAudio

EMBED_DIM, NUM_MELS, SAMPLES_PER_FRAME = 24, 5, 42
SMALL = {
    "sample_rate": 1000,
    "window_size": 19,
    "hop_size": 7,
    "num_mels": NUM_MELS,
    "conv_kernels": (3, 5),
    "conv_strides": (2, 3),
    "conv_dim": 11,
    "embed_dim": EMBED_DIM,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 40,
    "segment_lengths": (7, 16, 30),
    "dilation_rates": (1, 2, 3),
}
WAVEFORM = {"front_end": "waveform", "conv_kernels": (9, 7), "conv_strides": (7, 6)}


def make(**options) -> LongNetAudio:
    """Makes a model without the regularity of initial biases, in evaluation mode."""
    model = create_model("longnet_audio_tiny", **{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw(num_frames: int, *, batch: int = 2) -> Tensor:
    """Draws waveforms of so many frames, the last of them incomplete."""
    return 0.3 * torch.randn(batch, SAMPLES_PER_FRAME * num_frames - 5)
