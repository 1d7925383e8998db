"""LongNet over sound: an encoder of hours of audio, for classes, tags of every frame, and text.

A front end makes frames of the samples, log-mel or raw (`audio_front_end.py`); a bidirectional
encoder with dilated attention (arXiv 2307.02486) and rotary positions reads all of them at once;
the head makes one output for all, or one for every frame, which CTC reads as text
(`audio_ctc.py`). Recordings are read by `audio_files.py`.

Shape legend: b batch, n samples, t frames, e embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.registry import register_model

from .audio_checks import check_block, check_waveform
from .audio_config import LongNetAudioConfig
from .audio_ctc import Transcript, ctc_loss, greedy_search, prefix_beam_search
from .audio_files import AudioSource, audio_blocks
from .audio_front_end import AudioFrontEnd, LogMel
from .base import ZooModel, make_stack
from .heads import fit_module, masked_mean

__all__ = ["LongNetAudio", "longnet_audio_base", "longnet_audio_tiny"]


class LongNetAudio(ZooModel):
    """Encoder of audio with dilated attention, from seconds to hours.

    A waveform is a tensor of samples in [-1, 1] at `config.sample_rate`: a tensor does not say its
    rate, and at another one the model hears other pitches. `read_audio` resamples files. Samples of
    a batch are padded on the right, with anything, and `lengths` says how long they are: they equal
    those one by one. n samples make `num_frames(n)` frames; outputs of frames behind a sample's own
    (`frame_padding`) mean nothing.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.
        RuntimeError: If torchaudio is missing, for `front_end="log_mel"`.

    Example:
        >>> model = longnet_zoo.create_model("longnet_audio_tiny", num_classes=8)
        >>> logits = model(torch.randn(2, 48000), torch.tensor([48000, 16000]))  # (2, 8)
    """

    config_class = LongNetAudioConfig
    config: LongNetAudioConfig

    def __init__(self, config: LongNetAudioConfig) -> None:
        super().__init__(config)
        self.front_end = AudioFrontEnd(
            mel=_make_mel(config),
            convolutions=config.convolutions,
            conv_dim=config.conv_dim or config.embed_dim,
            embed_dim=config.embed_dim,
            chunk_frames=config.chunk_frames,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.stack = make_stack(config, position="rotary", rotary_base=config.rotary_base)
        self.fc_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(config.head_dropout)
        self.reset_classifier(config.num_classes)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the features."""
        return self.config.embed_dim

    @property
    def embed_dim(self) -> int:
        """Channels of the frames."""
        return self.config.embed_dim

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.config.frame_rate

    def num_frames(self, num_samples: int) -> int:
        """Counts the frames of so many samples."""
        return -(-num_samples // self.front_end.samples_per_frame)

    def frame_times(self, num_frames: int) -> Tensor:
        """Computes the middle of each frame in seconds, float64 (num_frames,)."""
        return (torch.arange(num_frames, dtype=torch.float64) + 0.5) / self.frame_rate

    def frame_padding(self, lengths: Tensor, num_frames: int) -> Tensor:
        """Marks the frames behind each sample's own.

        Args:
            lengths: Real samples of each, integers (batch,).
            num_frames: Frames of the batch.

        Returns:
            Bool (batch, num_frames), True = padding.
        """
        own = -(-lengths // self.front_end.samples_per_frame)
        return torch.arange(num_frames, device=lengths.device) >= own[:, None]

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Computes logits, or features for a model without a head.

        Args:
            waveform: Samples in [-1, 1] at `config.sample_rate`, floating (batch, samples).
            lengths: Real samples of each, int64 (batch,), on any device; None: all.

        Returns:
            (batch, num_classes) for `head="clip"`, else (batch, frames, num_classes); with
            `num_classes=0` features instead, (batch, embed_dim) or (batch, frames, embed_dim).

        Raises:
            ValueError: If shapes do not fit, a length is impossible or a sample is not finite.
            TypeError: If something is of a wrong dtype.
        """
        features = self.forward_features(waveform, lengths)
        return self.forward_head(features, key_padding_mask=self._mask(features, lengths))

    def forward_features(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Computes the features of all frames, (batch, frames, embed_dim); see `forward`."""
        check_waveform(waveform, lengths)
        frames = self.front_end(waveform, lengths)
        return self.forward_frames(frames, key_padding_mask=self._mask(frames, lengths))

    def forward_frames(self, frames: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Runs the encoder over frames, such as those of `embed_blocks`.

        Args:
            frames: Frames, (batch, frames, embed_dim).
            key_padding_mask: Bool (batch, frames), True = padding.

        Returns:
            Features, (batch, frames, embed_dim).
        """
        return self.stack(self.dropout(frames), key_padding_mask=key_padding_mask)

    def forward_head(
        self, features: Tensor, pre_logits: bool = False, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Maps features to logits; for `head="clip"` of their mean.

        Args:
            features: Features, (batch, frames, embed_dim).
            pre_logits: Whether to return what the head would get.
            key_padding_mask: Bool (batch, frames), True = padding, which the mean leaves out.

        Returns:
            As for `forward`.
        """
        if self.config.head == "clip":
            features = masked_mean(features, key_padding_mask)
        features = self.head_drop(self.fc_norm(features))
        return features if pre_logits else self.head(features)

    def log_mel(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Computes the log-mel spectrogram that the model sees, for pictures.

        Args:
            waveform: As for `forward`.
            lengths: As for `forward`.

        Returns:
            Natural logarithm of the mel power, (batch, columns, num_mels), a column for each
            `hop_size` samples.

        Raises:
            ValueError: If the model has none; else as for `forward`.
            TypeError: As for `forward`.
        """
        config = self.config
        if config.front_end != "log_mel":
            raise ValueError(
                f"log_mel needs a model with front_end='log_mel', got {config.front_end!r}."
            )
        check_waveform(waveform, lengths)
        columns = self.front_end.log_mel(waveform, lengths)
        return columns * config.log_mel_std + config.log_mel_mean

    def ctc_loss(
        self, waveform: Tensor, lengths: Tensor | None, targets: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Computes -ln P(text) per symbol, the mean over the batch, in float32.

        Args:
            waveform: As for `forward`.
            lengths: As for `forward`.
            targets: Symbols of the texts, int64 (batch, symbols), none of them `blank_id`.
            target_lengths: Symbols of each text, int64 (batch,).

        Returns:
            The loss in nats, a scalar.

        Raises:
            ValueError: If the head is another one, or a text has more symbols than frames allow:
                it is named; else as for `forward`.
            TypeError: As for `forward`.
        """
        logits, num_frames = self._ctc_logits(waveform, lengths)
        return ctc_loss(logits, num_frames, targets, target_lengths, blank_id=self.config.blank_id)

    @torch.no_grad()
    def transcribe(
        self, waveform: Tensor, lengths: Tensor | None = None, *, beam_size: int | None = None
    ) -> list[Transcript]:
        """Reads the text of each sample; call `eval()` before.

        Args:
            waveform: As for `forward`.
            lengths: As for `forward`.
            beam_size: Prefixes that the beam search keeps; None: the most probable alignment.

        Returns:
            One `Transcript` for each; `frame_times(n)[transcript.frames]` is when symbols begin.

        Raises:
            ValueError: If the head is another one or `beam_size` below 1; else as for `forward`.
            TypeError: As for `forward`.
        """
        logits, num_frames = self._ctc_logits(waveform, lengths)
        log_probs = functional.log_softmax(logits.float(), dim=-1).cpu()
        blank_id = self.config.blank_id
        samples = [x[:length] for x, length in zip(log_probs, num_frames, strict=True)]
        if beam_size is None:
            return [greedy_search(x, blank_id=blank_id) for x in samples]
        return [prefix_beam_search(x, beam_size=beam_size, blank_id=blank_id)[0] for x in samples]

    def embed_blocks(self, blocks: Iterable[Tensor]) -> Tensor:
        """Makes frames for `forward_frames` of audio that comes in blocks, such as a stream.

        Args:
            blocks: Samples of one recording at `config.sample_rate`, each floating (samples,).

        Returns:
            Frames, (1, frames, embed_dim), those of the blocks joined.

        Raises:
            ValueError: If there is no sample, or a block is of another shape or not finite.
            TypeError: If a block is not of a floating dtype.
        """
        return self.front_end.embed_blocks(map(check_block, blocks))

    @torch.no_grad()
    def file_features(self, source: AudioSource) -> Tensor:
        """Computes the features of a recording of any length, rate and number of channels.

        The file is read, resampled and embedded block by block; its frames are what is held. Call
        `eval()` before; `forward_head` makes logits of the features.

        Args:
            source: A path, the bytes of a file or a file object.

        Returns:
            Features, (1, frames, embed_dim), without gradients.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, empty or no audio.
        """
        config = self.config
        blocks = audio_blocks(source, sample_rate=config.sample_rate, seconds=config.chunk_seconds)
        return self.forward_frames(self.embed_blocks(blocks))

    def embed_file(self, source: AudioSource) -> Tensor:
        """Computes the embedding of a recording, (embed_dim,): the mean of `file_features`."""
        return self.file_features(source).mean(dim=1)[0]

    def get_classifier(self) -> nn.Module:
        """Returns the head, an `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, head: str | None = None) -> None:
        """Replaces the head by a new one.

        Args:
            num_classes: Outputs; 0 removes the head and its norm.
            head: "clip", "frames" or "ctc"; None: as it is.

        Raises:
            ValueError: If `num_classes` is negative or `head` unknown.
            TypeError: If `num_classes` is not an integer.
        """
        kind: Any = self.config.head if head is None else head
        self.config = replace(self.config, num_classes=num_classes, head=kind)
        self.fc_norm, self.head = nn.Identity(), nn.Identity()
        if num_classes == 0:
            return
        linear = nn.Linear(self.embed_dim, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        self.head = fit_module(linear, self)
        if kind == "clip":
            self.fc_norm = fit_module(nn.LayerNorm(self.embed_dim, eps=self.config.eps), self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Gives timm the groups of parameters for layer decay: front end, blocks, head.

        Args:
            coarse: Whether all blocks make one group.
        """
        blocks = r"^stack\.blocks" if coarse else r"^stack\.blocks\.(\d+)"
        return {
            "stem": r"^front_end",
            "blocks": [(blocks, None), (r"^stack\.norm|^fc_norm", (99999,))],
        }

    def flops(self, seq_len: int) -> int:
        """Counts the FLOPs for one recording, front end and head included; see `ZooModel`.

        The Fourier transform of the spectrogram is left out.

        Args:
            seq_len: Number of frames.
        """
        num_heads = 1 if self.config.head == "clip" else seq_len
        head = 2 * self.embed_dim * self.num_classes * num_heads
        return super().flops(seq_len) + self.front_end.flops(seq_len) + head

    def _mask(self, frames: Tensor, lengths: Tensor | None) -> Tensor | None:
        if lengths is None:
            return None
        return self.frame_padding(lengths.to(frames.device), frames.shape[1])

    def _ctc_logits(self, waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, list[int]]:
        """Computes logits (b, t, num_classes), and how many frames each sample has."""
        if self.config.head != "ctc" or not self.num_classes:
            raise ValueError(
                f"text needs a model with head='ctc' and num_classes, got {self.config.head!r} and "
                f"{self.num_classes}. Call reset_classifier(num_classes, 'ctc')."
            )
        logits = self(waveform, lengths)
        counts = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
        return logits, [self.num_frames(count) for count in counts]


def _make_mel(config: LongNetAudioConfig) -> LogMel | None:
    if config.front_end != "log_mel":
        return None
    return LogMel(
        sample_rate=config.sample_rate,
        window_size=config.window_size,
        hop_size=config.hop_size,
        num_mels=config.num_mels,
        mean=config.log_mel_mean,
        std=config.log_mel_std,
    )


_register = partial(register_model, family="longnet_audio", modality="audio", source="this project")


@_register(
    "longnet_audio_tiny",
    config=LongNetAudioConfig(
        embed_dim=128,
        num_layers=4,
        num_heads=4,
        segment_lengths=(128, 512, 2048, 8192),
        dilation_rates=(1, 2, 4, 8),
        num_mels=64,
        conv_strides=(2, 2),
    ),
    description="audio at 16 kHz, 25 frames/s, for laptops",
)
def longnet_audio_tiny(config: LongNetAudioConfig) -> LongNetAudio:
    """Builds a model of 0.9M parameters; its longest segment is 5 minutes."""
    return LongNetAudio(config)


@_register(
    "longnet_audio_base",
    config=LongNetAudioConfig(
        embed_dim=768,
        num_layers=12,
        num_heads=12,
        segment_lengths=(1024, 4096, 16384, 65536, 262144),
        dilation_rates=(1, 2, 4, 8, 16),
    ),
    description="audio at 16 kHz, 50 frames/s, an hour in a segment",
)
def longnet_audio_base(config: LongNetAudioConfig) -> LongNetAudio:
    """Builds a model of 88M parameters; its longest segment is 87 minutes."""
    return LongNetAudio(config)
