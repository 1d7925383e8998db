"""From the input of a modality to tokens with times: one encoder for each kind of modality.

Shape legend: b batch, t frames, p patches of a frame, n tokens, e embed_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longnet_zoo.layers import initialize_weights
from longnet_zoo.layers.timeline import as_rows
from longnet_zoo.ops.arguments import can_read
from longnet_zoo.ops.positions import float64_device

from .audio_checks import check_waveform
from .audio_front_end import AudioFrontEnd, LogMel
from .base import make_stack
from .checks import check_mask, check_tokens
from .multimodal_config import (
    AudioModality,
    FeaturesModality,
    FramesModality,
    ImageModality,
    LongNetMultimodalConfig,
    ModalityConfig,
    TextModality,
)
from .patch_encoder import init_weight
from .patches import PatchEmbed, resize_positions

__all__ = ["Encoded", "ModalityEncoder", "make_encoder"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Tokens of a modality.

    Attributes:
        tokens: Embeddings, (b, n, e).
        times: Their times, (b or 1, n), or None.
        padding_mask: Bool (b, n), True = padding, or None.
    """

    tokens: Tensor
    times: Tensor | None
    padding_mask: Tensor | None


class ModalityEncoder(nn.Module):
    """Makes embeddings of the input of a modality, then runs its own Transformer blocks.

    Args:
        config: The options of the model.
        modality: Those of the modality.
    """

    def __init__(self, config: LongNetMultimodalConfig, modality: ModalityConfig) -> None:
        super().__init__()
        self.modality = modality
        self.dropout = nn.Dropout(config.dropout)
        self.stack = None
        if modality.num_layers:
            own = replace(
                config,
                num_layers=modality.num_layers,
                segment_lengths=modality.segment_lengths,
                dilation_rates=modality.dilation_rates,
            )
            self.stack = make_stack(own, position="rotary", rotary_base=config.rotary_base)

    def forward(self, x: Tensor, times: Tensor | None, padding_mask: Tensor | None) -> Encoded:
        """Makes tokens of an input that `check` has passed.

        Args:
            x: The input, (b, ...).
            times: What `check` returns of them.
            padding_mask: What `check` returns of it.
        """
        if padding_mask is not None and x.is_floating_point():
            # Whatever padding holds: NaN would reach the gradient of the weights.
            x = x.masked_fill(padding_mask.view(*padding_mask.shape, *[1] * (x.ndim - 2)), 0.0)
        tokens = self.dropout(self.embed(x, padding_mask))
        mask = None
        if padding_mask is not None:
            mask = self.token_padding(padding_mask, tokens.shape[1])
        if self.stack is not None:
            tokens = self.stack(tokens, key_padding_mask=mask)
        times = self.input_times(x, times)
        times = self.token_times(times, tokens.shape[1], tokens.device)
        return Encoded(tokens=tokens, times=times, padding_mask=mask)

    def embed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Makes embeddings, (b, n, e)."""
        raise NotImplementedError(f"{type(self).__name__} must define embed.")

    def units(self, x: Tensor) -> int:
        """Counts what times and padding are of: tokens, frames of a strip, samples of audio."""
        return x.shape[1]

    def check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        """Checks an input of samples that all have it; raises ValueError or TypeError."""
        if padding_mask is not None:
            name = f"padding_masks[{self.modality.name!r}]"
            check_mask(name, padding_mask, (len(x), self.units(x)))
            # A mean of nothing would stand for the modality.
            if can_read(padding_mask) and (is_empty := padding_mask.all(dim=1)).any():
                raise ValueError(
                    f"{name} must leave something of every sample, got nothing but padding in "
                    f"{int(is_empty.sum())} of {len(x)}. Say by present that they lack it."
                )

    def check_times(self, x: Tensor, times: Tensor) -> Tensor:
        """Checks times, and makes them (b or 1, units)."""
        return as_rows(self.modality.name, times, batch=len(x), length=self.units(x))

    def input_times(self, x: Tensor, times: Tensor | None) -> Tensor | None:
        """Makes the times of an input that has some without being told."""
        return times

    def token_padding(self, padding_mask: Tensor, num_tokens: int) -> Tensor:
        """Says which tokens are padding, (b, n), from a mask of the input."""
        return padding_mask

    def token_times(
        self, times: Tensor | None, num_tokens: int, device: torch.device
    ) -> Tensor | None:
        """Makes the times of the tokens, (b or 1, n), of those of the input."""
        return times

    def flops(self, num_tokens: int) -> int:
        """Counts the FLOPs of making so many embeddings, a multiply-add as two."""
        return 0


class FeaturesEncoder(ModalityEncoder):
    """A linear map of vectors; see `FeaturesModality`."""

    def __init__(self, config: LongNetMultimodalConfig, modality: FeaturesModality) -> None:
        super().__init__(config, modality)
        self.input_dim = modality.input_dim
        self.proj = nn.Linear(modality.input_dim, config.embed_dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def embed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Makes embeddings, (b, n, e)."""
        return self.proj(x.to(self.proj.weight.dtype))

    def check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        """Checks vectors, floating (b, n, input_dim)."""
        if x.ndim != 3 or 0 in x.shape or x.shape[2] != self.input_dim or not x.is_floating_point():
            raise ValueError(
                f"inputs[{self.modality.name!r}] must be floating (batch, seq_len, input_dim) with "
                f"input_dim={self.input_dim}, got {tuple(x.shape)} of {x.dtype}."
            )
        super().check(x, padding_mask)

    def flops(self, num_tokens: int) -> int:
        """Counts the FLOPs of making so many embeddings, a multiply-add as two."""
        return 2 * self.proj.weight.numel() * num_tokens


class TextEncoder(ModalityEncoder):
    """A table of embeddings; see `TextModality`."""

    def __init__(self, config: LongNetMultimodalConfig, modality: TextModality) -> None:
        super().__init__(config, modality)
        self.embedding = nn.Embedding(modality.vocab_size, config.embed_dim)
        initialize_weights(self.embedding, gain=1.0)

    def embed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Makes embeddings, (b, n, e)."""
        return self.embedding(x)

    def check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        """Checks token ids, integers (b, n)."""
        check_tokens(x, vocab_size=self.embedding.num_embeddings)
        super().check(x, padding_mask)


class FramesEncoder(ModalityEncoder):
    """Patches of one image or of the frames of a strip; see `ImageModality`, `FramesModality`."""

    def __init__(self, config: LongNetMultimodalConfig, modality: ImageModality) -> None:
        super().__init__(config, modality)
        self.frame_rate = modality.frame_rate if isinstance(modality, FramesModality) else None
        self.is_strip = isinstance(modality, FramesModality)
        side = modality.img_size // modality.patch_size
        self.grid = (side, side)
        self.patch_embed = PatchEmbed(
            patch_size=modality.patch_size, in_chans=modality.in_chans, embed_dim=config.embed_dim
        )
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, config.embed_dim))
        init_weight(self.pos_embed)

    def embed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Makes embeddings, (b, t * p, e)."""
        frames = x.flatten(0, 1) if self.is_strip else x
        patches = self.patch_embed(frames)
        grid = self.patch_embed.grid_size(*frames.shape[-2:])
        patches = patches + resize_positions(self.pos_embed, old_grid=self.grid, new_grid=grid)
        return patches.reshape(len(x), -1, patches.shape[-1])

    def units(self, x: Tensor) -> int:
        """Counts the frames."""
        return x.shape[1] if self.is_strip else 1

    def check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        """Checks images, floating (b, c, h, w), or strips of them, (b, t, c, h, w)."""
        axes = "batch, frames, " if self.is_strip else "batch, "
        if x.ndim != 4 + self.is_strip or 0 in x.shape:
            raise ValueError(
                f"inputs[{self.modality.name!r}] must be ({axes}in_chans, height, width), got "
                f"{tuple(x.shape)}."
            )
        super().check(x, padding_mask)

    def input_times(self, x: Tensor, times: Tensor | None) -> Tensor | None:
        """Makes the times of frames that follow each other at `frame_rate`."""
        if times is not None or self.frame_rate is None:
            return times
        return (
            torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[None] / self.frame_rate
        )

    def token_padding(self, padding_mask: Tensor, num_tokens: int) -> Tensor:
        """Marks all patches of a frame that is padding."""
        return _repeated(padding_mask, num_tokens)

    def token_times(
        self, times: Tensor | None, num_tokens: int, device: torch.device
    ) -> Tensor | None:
        """Gives all patches of a frame its time."""
        return None if times is None else _repeated(times, num_tokens)

    def flops(self, num_tokens: int) -> int:
        """Counts the FLOPs of making so many embeddings, a multiply-add as two."""
        return 2 * self.patch_embed.proj.weight.numel() * num_tokens


class AudioEncoder(ModalityEncoder):
    """Frames of a log-mel spectrogram; see `AudioModality`."""

    modality: AudioModality

    def __init__(self, config: LongNetMultimodalConfig, modality: AudioModality) -> None:
        super().__init__(config, modality)
        mel = LogMel(
            sample_rate=modality.sample_rate,
            window_size=modality.window_size,
            hop_size=modality.hop_size,
            num_mels=modality.num_mels,
            mean=modality.log_mel_mean,
            std=modality.log_mel_std,
        )
        self.front_end = AudioFrontEnd(
            mel=mel,
            convolutions=modality.convolutions,
            conv_dim=config.embed_dim,
            embed_dim=config.embed_dim,
            chunk_frames=max(1, round(modality.chunk_seconds * modality.frame_rate)),
        )

    def embed(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Makes embeddings, (b, n, e)."""
        return self.front_end(x, None if padding_mask is None else _lengths(padding_mask))

    def check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        """Checks samples, floating (b, samples), padded on the right."""
        if padding_mask is None or x.ndim != 2:
            return check_waveform(x, None)
        super().check(x, padding_mask)
        if can_read(padding_mask):
            is_right = (padding_mask[:, 1:] >= padding_mask[:, :-1]).all(dim=1)
            if not is_right.all():
                rows = (~is_right).nonzero().flatten().tolist()
                raise ValueError(
                    f"padding_masks[{self.modality.name!r}] must have padding on the right, got "
                    f"samples of sound behind some in the rows {rows}."
                )
        check_waveform(x, _lengths(padding_mask))

    def check_times(self, x: Tensor, times: Tensor) -> Tensor:
        """Checks where each recording starts, and makes it (b or 1, 1)."""
        return as_rows(self.modality.name, times, batch=len(x), length=1)

    def token_padding(self, padding_mask: Tensor, num_tokens: int) -> Tensor:
        """Marks the frames behind the last sample."""
        samples = self.front_end.samples_per_frame
        frames = torch.arange(num_tokens, device=padding_mask.device)
        return frames * samples >= _lengths(padding_mask)[:, None]

    def token_times(
        self, times: Tensor | None, num_tokens: int, device: torch.device
    ) -> Tensor | None:
        """Computes the time of the middle of each frame."""
        frames = torch.arange(num_tokens, device=device, dtype=torch.float32)
        middles = (frames[None] + 0.5) / self.modality.frame_rate
        if times is None:
            return middles
        # Seconds since 1970 and fractions of them do not fit float32.
        place = float64_device(times.device)
        return times.to(place, torch.float64) + middles.to(place)

    def flops(self, num_tokens: int) -> int:
        """Counts the FLOPs of making so many embeddings, a multiply-add as two."""
        return self.front_end.flops(num_tokens)


_ENCODERS: Mapping[str, Any] = {
    "image": FramesEncoder,
    "frames": FramesEncoder,
    "audio": AudioEncoder,
    "text": TextEncoder,
    "features": FeaturesEncoder,
}


def make_encoder(config: LongNetMultimodalConfig, modality: ModalityConfig) -> ModalityEncoder:
    """Makes the encoder of a modality.

    Raises:
        RuntimeError: If torchaudio is missing, for audio.
    """
    return _ENCODERS[modality.kind](config, modality)


def _lengths(padding_mask: Tensor) -> Tensor:
    return (~padding_mask).sum(dim=1)


def _repeated(values: Tensor, num_tokens: int) -> Tensor:
    """Repeats those of each frame for its patches: (b or 1, t) to (b or 1, n)."""
    return values[..., None].expand(-1, -1, num_tokens // values.shape[1]).flatten(1)
