"""Options of the multimodal model: any set of modalities, each with what makes tokens of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from longnet_zoo.layers.multimodal import check_modality_names
from longnet_zoo.ops.pattern import DilatedPattern

from .checks import (
    check_choices,
    check_finite,
    check_integers,
    check_positive,
    check_probabilities,
)
from .config import ModelConfig, ZooConfig

__all__ = [
    "AudioModality",
    "FeaturesModality",
    "FramesModality",
    "ImageModality",
    "LongNetMultimodalConfig",
    "ModalityConfig",
    "TextModality",
    "modality_from",
]


@dataclass(frozen=True, kw_only=True)
class ModalityConfig(ZooConfig):
    """Options that every modality has; use the class of its kind.

    Attributes:
        name: What it is called in `inputs`, a name that a variable could have.
        kind: What its input is.
        num_layers: Transformer blocks of its own before modalities meet; 0: none.
        segment_lengths: Tokens per segment of each branch of its own attention, in these blocks
            and within the modality later on.
        dilation_rates: Dilation rate of each branch.
    """

    name: str
    kind: str
    num_layers: int = 1
    segment_lengths: tuple[int, ...] = (64, 256, 1024)
    dilation_rates: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        check_modality_names([self.name])
        check_choices(self, "kind")
        check_integers(self, "num_layers", minimum=0)
        pattern = self.pattern  # Raises for lengths and rates that make no pattern.
        object.__setattr__(self, "segment_lengths", pattern.segment_lengths)
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)

    @property
    def pattern(self) -> DilatedPattern:
        """Lengths and rates of its own attention; the other switches are those of the model."""
        return DilatedPattern(
            segment_lengths=self.segment_lengths, dilation_rates=self.dilation_rates
        )


@dataclass(frozen=True, kw_only=True)
class ImageModality(ModalityConfig):
    """Images (batch, in_chans, height, width) as patches, without a time of their own.

    Attributes:
        img_size: Side in pixels of the square grid of positions; other sizes are interpolated.
        patch_size: Side of a patch in pixels.
        in_chans: Channels.
    """

    kind: Literal["image"] = "image"
    img_size: int = 64
    patch_size: int = 8
    in_chans: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "img_size", "patch_size", "in_chans")
        if self.img_size % self.patch_size:
            raise ValueError(
                f"img_size must be a multiple of patch_size={self.patch_size}, got {self.img_size}."
            )


@dataclass(frozen=True, kw_only=True)
class FramesModality(ImageModality):
    """Video or a strip of images, (batch, frames, in_chans, height, width); see `ImageModality`.

    Attributes:
        frame_rate: Frames per unit of time: frame i is at i / frame_rate unless `times` say
            otherwise. None: frames have no time unless `times` are given.
    """

    kind: Literal["frames"] = "frames"  # type: ignore[assignment]
    frame_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame_rate is not None:
            check_positive(self, "frame_rate")


@dataclass(frozen=True, kw_only=True)
class AudioModality(ModalityConfig):
    """Samples (batch, samples) at one rate, as frames of a log-mel spectrogram.

    Frame t is at (t + 1/2) / frame_rate seconds; `times` (1,) or (batch, 1) say where a recording
    starts, in seconds. Fields as for `LongNetAudioConfig`.

    Attributes:
        sample_rate: Samples per second.
        window_size: Samples that a column of the spectrogram sees.
        hop_size: Samples from one column to the next.
        num_mels: Mel bands.
        log_mel_mean: What is subtracted from the natural logarithm.
        log_mel_std: What it is divided by after that.
        conv_strides: Stride of each convolution over columns; kernels are larger by one, at least
            3. Their product times `hop_size` is the samples of a token.
        chunk_seconds: Seconds of audio in the front end at once; no part of the result.
    """

    kind: Literal["audio"] = "audio"
    sample_rate: int = 16000
    window_size: int = 400
    hop_size: int = 160
    num_mels: int = 64
    log_mel_mean: float = -5.0
    log_mel_std: float = 4.0
    conv_strides: tuple[int, ...] = (2, 2)
    chunk_seconds: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "sample_rate", "window_size", "hop_size", "num_mels")
        check_positive(self, "log_mel_std", "chunk_seconds")
        check_finite(self, "log_mel_mean")
        strides = self.conv_strides
        are_many = isinstance(strides, (tuple, list)) and len(strides) > 0
        if not are_many or any(type(stride) is not int or stride < 1 for stride in strides):
            raise ValueError(f"conv_strides must be integers of at least 1, got {strides!r}.")
        object.__setattr__(self, "conv_strides", tuple(strides))
        if self.window_size < self.hop_size:
            raise ValueError(
                "window_size must be at least hop_size, or samples are lost, got "
                f"window_size={self.window_size} and hop_size={self.hop_size}."
            )

    @property
    def convolutions(self) -> tuple[tuple[int, int], ...]:
        """Kernel size and stride of each convolution."""
        return tuple((max(3, stride + 1), stride) for stride in self.conv_strides)

    @property
    def frame_rate(self) -> float:
        """Tokens per second."""
        samples = self.hop_size
        for stride in self.conv_strides:
            samples *= stride
        return self.sample_rate / samples


@dataclass(frozen=True, kw_only=True)
class TextModality(ModalityConfig):
    """Token ids (batch, seq_len), without a time unless `times` are given.

    Attributes:
        vocab_size: Number of token ids; 259 are bytes and three special ones.
    """

    kind: Literal["text"] = "text"
    vocab_size: int = 259

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "vocab_size")


@dataclass(frozen=True, kw_only=True)
class FeaturesModality(ModalityConfig):
    """Vectors of any origin, (batch, seq_len, input_dim), without a time unless `times` are given.

    Attributes:
        input_dim: Numbers of a vector.
    """

    kind: Literal["features"] = "features"
    input_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "input_dim")


_KINDS: dict[str, type[ModalityConfig]] = {
    "image": ImageModality,
    "frames": FramesModality,
    "audio": AudioModality,
    "text": TextModality,
    "features": FeaturesModality,
}


def modality_from(options: ModalityConfig | Mapping[str, Any]) -> ModalityConfig:
    """Makes the config of a modality from its options, `kind` and `name` among them.

    Raises:
        ValueError: If the kind is unknown, or an option has a bad value.
        TypeError: If an option is unknown or missing.
    """
    if isinstance(options, ModalityConfig):
        return options
    if not isinstance(options, Mapping):
        raise TypeError(f"a modality must be a config or a mapping of options, got {options!r}.")
    kind = options.get("kind")
    if kind not in _KINDS:
        raise ValueError(
            f"a modality must have a kind, one of {', '.join(map(repr, _KINDS))}, got {kind!r}."
        )
    known = {field.name: field.default is MISSING for field in fields(_KINDS[kind])}
    unknown = [name for name in options if name not in known]
    lacking = [name for name, is_needed in known.items() if is_needed and name not in options]
    if unknown or lacking:
        got = [f"no {name}" for name in lacking] + [f"the unknown {name!r}" for name in unknown]
        raise TypeError(
            f"a modality of kind {kind!r} must have options among {', '.join(known)}, got "
            f"{' and '.join(got)} in {dict(options)}."
        )
    return _KINDS[kind](**options)


@dataclass(frozen=True, kw_only=True)
class LongNetMultimodalConfig(ModelConfig):
    """Options of `LongNetMultimodal`, besides those of every stack.

    `num_layers` are the blocks in which modalities meet; `segment_lengths` and `dilation_rates` the
    pattern of the attention across them.

    Attributes:
        modalities: The modalities: configs of their kinds, or mappings of their options.
        time_rate: Rotary positions per unit of time, in the attention across modalities.
        rotary_base: Ratio of the longest to the shortest wavelength of the positions.
        modality_dropout: Probability that training drops a modality of a sample; one stays.
        num_classes: Outputs of the head; 0: none, then the model returns pooled features.
        global_pool: "avg" (mean of each modality, then of those that a sample has) or "query" (a
            learned query attends to the tokens of all).
        head_dropout: Dropout before the head.
    """

    modalities: tuple[ModalityConfig | Mapping[str, Any], ...]
    time_rate: float = 10.0
    rotary_base: float = 10000.0
    modality_dropout: float = 0.0
    num_classes: int = 0
    global_pool: Literal["avg", "query"] = "avg"
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, "num_classes", minimum=0)
        check_positive(self, "time_rate", "rotary_base")
        check_choices(self, "global_pool")
        check_probabilities(self, "modality_dropout", "head_dropout")
        if self.norm == "deepnorm":
            raise ValueError("norm must be 'sub_ln' or 'pre_ln' here, got 'deepnorm'.")
        if self.head_dim % 2:
            raise ValueError(
                "rotary positions need an even head_dim = embed_dim / num_heads, got "
                f"embed_dim={self.embed_dim} and num_heads={self.num_heads}."
            )
        if not isinstance(self.modalities, (tuple, list)):
            raise TypeError(
                "modalities must be a tuple of configs or mappings of options, got "
                f"{self.modalities!r}."
            )
        object.__setattr__(self, "modalities", tuple(map(modality_from, self.modalities)))
        check_modality_names(self.names)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"modalities must have different names, got {', '.join(self.names)}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(modality.name for modality in self.parts)

    @property
    def parts(self) -> tuple[ModalityConfig, ...]:
        """The modalities, all as configs."""
        return tuple(map(modality_from, self.modalities))

    def pattern_of(self, modality: ModalityConfig) -> DilatedPattern:
        """The pattern of a modality's own attention."""
        return DilatedPattern(
            segment_lengths=modality.segment_lengths,
            dilation_rates=modality.dilation_rates,
            head_offset=self.head_offset,
            padded_keys=self.padded_keys,
        )
