"""Options of the audio model: what it hears, how sound becomes frames, and its head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .checks import (
    check_choices,
    check_finite,
    check_integers,
    check_positive,
    check_probabilities,
)
from .config import ModelConfig

__all__ = ["AudioHead", "FrontEnd", "LongNetAudioConfig"]

FrontEnd = Literal["log_mel", "waveform"]
AudioHead = Literal["clip", "frames", "ctc"]

# Kernels and strides: two convolutions over log-mel frames halve their number; those over samples
# are wav2vec 2.0's (arXiv 2006.11477, Sec. 4.2), one frame for 320 samples.
_CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "log_mel": ((3, 3), (1, 2)),
    "waveform": ((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)),
}


@dataclass(frozen=True, kw_only=True)
class LongNetAudioConfig(ModelConfig):
    """Options of `LongNetAudio`, besides those of every stack.

    Attributes:
        sample_rate: Samples per second that the model is made for.
        front_end: "log_mel" (log-mel spectrogram, then convolutions) or "waveform" (convolutions
            over the samples).
        window_size: Samples that a column of the spectrogram sees, for "log_mel".
        hop_size: Samples from one column to the next, for "log_mel".
        num_mels: Mel bands, for "log_mel".
        log_mel_mean: What is subtracted from the natural logarithm, for "log_mel".
        log_mel_std: What it is divided by after that.
        conv_kernels: Kernel size of each convolution; None: those of the front end.
        conv_strides: Stride of each convolution, no more than its kernel; None: as above.
        conv_dim: Channels of the convolutions; None: `embed_dim`.
        chunk_seconds: Seconds of audio in the front end at once; no part of the result.
        rotary_base: Ratio of the longest to the shortest wavelength of the positions.
        head: "clip" (one output for all), "frames" (one for every frame) or "ctc" (one for every
            frame, read as text).
        num_classes: Outputs of the head; 0: none, then the model returns features. For "ctc" with
            the blank.
        blank_id: The output that stands for no symbol, for "ctc".
        head_dropout: Dropout before the head.
    """

    sample_rate: int = 16000
    front_end: FrontEnd = "log_mel"
    window_size: int = 400
    hop_size: int = 160
    num_mels: int = 80
    log_mel_mean: float = -5.0
    log_mel_std: float = 5.0
    conv_kernels: tuple[int, ...] | None = None
    conv_strides: tuple[int, ...] | None = None
    conv_dim: int | None = None
    chunk_seconds: float = 30.0
    rotary_base: float = 10000.0
    head: AudioHead = "clip"
    num_classes: int = 0
    blank_id: int = 0
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "sample_rate", "window_size", "hop_size", "num_mels")
        check_integers(self, "conv_dim", optional=True)
        check_integers(self, "num_classes", "blank_id", minimum=0)
        check_positive(self, "log_mel_std", "chunk_seconds", "rotary_base")
        check_probabilities(self, "head_dropout")
        check_choices(self, "front_end", "head")
        for name in ("conv_kernels", "conv_strides"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        self._check_front_end()
        self._check_combinations()

    @property
    def convolutions(self) -> tuple[tuple[int, int], ...]:
        """Kernel size and stride of each convolution."""
        kernels, strides = _CONVOLUTIONS[self.front_end]
        kernels = kernels if self.conv_kernels is None else self.conv_kernels
        strides = strides if self.conv_strides is None else self.conv_strides
        if len(kernels) != len(strides):
            raise ValueError(
                "conv_kernels and conv_strides must be of one length, got "
                f"conv_kernels={kernels} and conv_strides={strides}."
            )
        return tuple(zip(kernels, strides, strict=True))

    @property
    def samples_per_frame(self) -> int:
        """Samples from one frame of the encoder to the next."""
        strides = math.prod(stride for _, stride in self.convolutions)
        return strides * (self.hop_size if self.front_end == "log_mel" else 1)

    @property
    def frame_rate(self) -> float:
        """Frames of the encoder per second."""
        return self.sample_rate / self.samples_per_frame

    @property
    def chunk_frames(self) -> int:
        """Frames that the front end makes at once."""
        return max(1, round(self.chunk_seconds * self.frame_rate))

    def _check_front_end(self) -> None:
        check_finite(self, "log_mel_mean")
        if self.window_size < self.hop_size:
            raise ValueError(
                "window_size must be at least hop_size, or samples are lost, got "
                f"window_size={self.window_size} and hop_size={self.hop_size}."
            )
        for kernel, stride in self.convolutions:
            if not 1 <= stride <= kernel:
                raise ValueError(
                    "conv_strides must be from 1 to the kernel size, or samples are lost, got a "
                    f"stride of {stride} for a kernel of {kernel}."
                )

    def _check_combinations(self) -> None:
        if self.rotary_base <= 1.0:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}.")
        if self.head_dim % 2:
            raise ValueError(
                "rotary positions need an even head_dim = embed_dim / num_heads, got "
                f"embed_dim={self.embed_dim} and num_heads={self.num_heads}."
            )
        if self.head == "ctc" and self.num_classes and self.blank_id >= self.num_classes:
            raise ValueError(
                "blank_id must be one of the num_classes outputs, got "
                f"blank_id={self.blank_id} and num_classes={self.num_classes}."
            )


def _integers(name: str, values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None
    if not isinstance(values, (tuple, list)) or any(type(value) is not int for value in values):
        raise TypeError(f"{name} must be a tuple of integers or None, got {values!r}.")
    if not values:
        raise ValueError(f"{name} must have at least one entry, got {values!r}.")
    return tuple(values)
