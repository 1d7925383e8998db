"""From samples to frames: log-mel spectrogram or raw samples, then strided convolutions.

Every layer is local: its output t sees `kernel_size` inputs, from t * stride - left on. So frames
[start, stop) depend on one span of samples, found from the last layer to the first, and a chunk is
computed from its span alone. Before the first and behind the last position of a sequence all is
zero at every layer, whatever the tensor holds there. Hence chunks joined equal the whole, and a
padded sequence equals itself alone.

Shape legend: b batch, n samples, c channels, m positions of a layer, e embed_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["AudioFrontEnd", "ConvLayer", "LogMel"]

# Added to the power before the logarithm: far below quiet sound, well above rounding.
_FLOOR = 1e-6


class LogMel(nn.Module):
    """Log-mel spectrogram, normalised by fixed numbers: (ln(mel power + 1e-6) - mean) / std.

    Windows are Hann's, padded to a power of two for the Fourier transform; bands are triangles on
    the mel scale of HTK from 0 to half the sample rate, as `torchaudio.transforms.MelSpectrogram`
    has them by default. Computed in float32, whatever the dtype of the model.

    Args:
        sample_rate: Samples per second.
        window_size: Samples of a window.
        hop_size: Samples from one window to the next, at most `window_size`.
        num_mels: Bands.
        mean: What is subtracted from the logarithm.
        std: What it is divided by.

    Raises:
        ValueError: If a band is so narrow that no frequency of the transform lies in it.
        RuntimeError: If torchaudio is missing.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        window_size: int,
        hop_size: int,
        num_mels: int,
        mean: float,
        std: float,
    ) -> None:
        super().__init__()
        self.sample_rate, self.num_mels = sample_rate, num_mels
        self.kernel_size, self.stride = window_size, hop_size
        self.left = (window_size - hop_size) // 2
        self.fft_size = 1 << (window_size - 1).bit_length()
        self.mean, self.std = mean, std
        self.window: Tensor
        self.filters: Tensor
        window, filters = self._make_tables(torch.get_default_device())
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps samples (batch, 1, n) to normalised log-mels, (batch, num_mels, m)."""
        with torch.autocast(x.device.type, enabled=False):
            windows = x[:, 0].to(self.window.dtype).unfold(1, self.kernel_size, self.stride)
            spectrum = torch.fft.rfft(windows * self.window, n=self.fft_size)
            power = spectrum.real.square() + spectrum.imag.square()
            logarithm = (power @ self.filters + _FLOOR).log()
            return ((logarithm - self.mean) / self.std).transpose(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogMel:
        # Made anew wherever the module goes: a cast to a half type would round them for good, and
        # a module that was made without memory has none to copy.
        super()._apply(fn, recurse)
        self.window, self.filters = self._make_tables(self.window.device)
        return self

    def _make_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Makes the window (window_size,) and the bands (fft_size / 2 + 1, num_mels)."""
        size = (self.fft_size // 2 + 1, self.num_mels)
        if device.type == "meta":  # what a model is can be told without torchaudio
            return torch.empty(self.kernel_size, device=device), torch.empty(size, device=device)
        try:
            from torchaudio.functional import melscale_fbanks
        except ImportError as error:
            raise RuntimeError(
                "front_end='log_mel' needs torchaudio. Install it: pip install torchaudio"
            ) from error
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore", UserWarning)  # of empty bands: an error below
            filters = melscale_fbanks(
                size[0], 0.0, self.sample_rate / 2, self.num_mels, self.sample_rate
            )
        num_empty = int((filters.amax(dim=0) == 0).sum())
        if num_empty:
            raise ValueError(
                "every mel band must have a frequency of the Fourier transform, got "
                f"num_mels={self.num_mels} with {num_empty} empty bands for a window_size of "
                f"{self.kernel_size} samples at {self.sample_rate} Hz. Take fewer bands or longer "
                "windows."
            )
        return torch.hann_window(self.kernel_size, device=device), filters.to(device)


class ConvLayer(nn.Module):
    """One convolution over time with GELU, and a LayerNorm of the channels before it if asked for.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_size: Positions that an output sees.
        stride: Positions from one output to the next, at most `kernel_size`.
        has_norm: Whether there is a norm.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int, kernel_size: int, stride: int, has_norm: bool
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.left = (kernel_size - stride) // 2
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride)
        self.norm = nn.LayerNorm(out_channels) if has_norm else None
        nn.init.kaiming_normal_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_channels, n) to (batch, out_channels, m), without any padding."""
        x = self.conv(x.to(self.conv.weight.dtype))
        if self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return functional.gelu(x)


class AudioFrontEnd(nn.Module):
    """Makes frames of audio; of long audio chunk by chunk.

    Frame t stands for the samples from t * samples_per_frame on, so n samples give
    ceil(n / samples_per_frame) frames. Without gradients no more than a chunk is ever held besides
    samples and frames; with them each chunk is computed again in the backward pass.

    Args:
        mel: The spectrogram that comes first; None: convolutions over the samples.
        convolutions: Kernel size and stride of each convolution.
        conv_dim: Channels of the convolutions.
        embed_dim: Channels of the frames.
        chunk_frames: Frames that are made at once. While a graph is compiled, all are.

    Attributes:
        samples_per_frame: Samples from one frame to the next.
    """

    def __init__(
        self,
        *,
        mel: LogMel | None,
        convolutions: Sequence[tuple[int, int]],
        conv_dim: int,
        embed_dim: int,
        chunk_frames: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if mel is None else [mel]
        channels = 1 if mel is None else mel.num_mels
        for kernel_size, stride in convolutions:
            # Raw samples have no scale of their own; log-mels are normalised, and keep theirs.
            layer = ConvLayer(
                in_channels=channels,
                out_channels=conv_dim,
                kernel_size=kernel_size,
                stride=stride,
                has_norm=mel is None,
            )
            layers, channels = [*layers, layer], conv_dim
        self.layers = nn.ModuleList(layers)
        self.proj = nn.Linear(conv_dim, embed_dim)
        self.chunk_frames = chunk_frames
        self.samples_per_frame = _total_stride(self.layers)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def flops(self, num_frames: int) -> int:
        """Counts the FLOPs of the matrix products for so many frames."""
        total, count = 2 * self.proj.weight.numel() * num_frames, num_frames
        for layer in reversed(self.layers):
            assert isinstance(layer, (LogMel, ConvLayer))
            weight = layer.filters if isinstance(layer, LogMel) else layer.conv.weight
            total, count = total + 2 * weight.numel() * count, count * layer.stride
        return total

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Makes all frames.

        Args:
            waveform: Samples, (batch, samples).
            lengths: Real samples of each, integers (batch,); None: all.

        Returns:
            Frames, (batch, frames, embed_dim); those behind a sequence mean nothing.
        """
        return self._in_chunks(self._frames, self.layers, waveform, lengths, self.chunk_frames)

    def log_mel(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Computes what the first convolution sees, (batch, columns, num_mels)."""
        mel = self.layers[:1]
        chunk_size = max(1, self.chunk_frames * self.samples_per_frame // _total_stride(mel))
        return self._in_chunks(self._columns, mel, waveform, lengths, chunk_size)

    def embed_blocks(self, blocks: Iterable[Tensor]) -> Tensor:
        """Makes the frames of audio that comes in blocks, holding no more than needed.

        Args:
            blocks: Samples of one sequence in their order, each (samples,).

        Returns:
            Frames, (1, frames, embed_dim): those of the blocks joined.

        Raises:
            ValueError: If there is no sample.
        """
        device, frame_size = self.proj.weight.device, self.samples_per_frame
        tail = torch.zeros(1, 0, device=device)
        offset, parts, done = 0, [], 0
        behind = _spans(self.layers, 0, 1)[0][1]  # samples before it decide the first frame
        for block in blocks:
            tail = torch.cat([tail, block[None].to(device)], dim=1)
            ready = (offset + tail.shape[1] - behind) // frame_size + 1
            if ready > done:
                parts.append(self._ready(tail, offset, done, ready))
                done, start = ready, max(0, _spans(self.layers, ready, ready + 1)[0][0])
                tail, offset = tail[:, start - offset :], start
        seen = offset + tail.shape[1]
        if seen == 0:
            raise ValueError("blocks must hold at least one sample, got none.")
        if done < -(-seen // frame_size):
            parts.append(self._ready(tail, offset, done, -(-seen // frame_size)))
        return torch.cat(parts, dim=1)

    def _ready(self, tail: Tensor, offset: int, start: int, stop: int) -> Tensor:
        seen = offset + tail.shape[1]
        starts = range(start, stop, self.chunk_frames)
        ends = [min(first + self.chunk_frames, stop) for first in starts]
        runs = [
            self._frames(tail, _limit(tail, seen), first, end, offset=offset)
            for first, end in zip(starts, ends, strict=True)
        ]
        return torch.cat(runs, dim=1)

    def _in_chunks(
        self,
        run: Callable[..., Tensor],
        layers: Iterable[nn.Module],
        waveform: Tensor,
        lengths: Tensor | None,
        chunk_size: int,
    ) -> Tensor:
        """Runs a function of (waveform, lengths, start, stop) chunk by chunk, and joins them."""
        num_samples = waveform.shape[1]
        total = -(-num_samples // _total_stride(layers))
        limits = _limit(waveform, num_samples)
        if lengths is not None:
            limits = lengths.to(waveform.device)[:, None]
        if torch.compiler.is_compiling() or total <= chunk_size:
            return run(waveform, limits, 0, total)
        if torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        starts = range(0, total, chunk_size)
        return torch.cat(
            [run(waveform, limits, start, min(start + chunk_size, total)) for start in starts],
            dim=1,
        )

    def _frames(
        self, samples: Tensor, limits: Tensor, start: int, stop: int, *, offset: int = 0
    ) -> Tensor:
        """Makes frames [start, stop); `samples` begin at the absolute place `offset`."""
        x = _run_layers(self.layers, samples, limits, start, stop, offset)
        return self.proj(x.transpose(1, 2))

    def _columns(self, samples: Tensor, limits: Tensor, start: int, stop: int) -> Tensor:
        return _run_layers(self.layers[:1], samples, limits, start, stop, 0).transpose(1, 2)


def _run_layers(
    layers: Iterable[Any],
    samples: Tensor,
    limits: Tensor,
    start: int,
    stop: int,
    offset: int,
) -> Tensor:
    """Computes outputs [start, stop) of the last layer, (b, c, stop - start).

    Args:
        layers: What is run.
        samples: Samples, (b, n).
        limits: Where each sequence ends, (b, 1) or (1, 1).
        start: The first output.
        stop: The end of the outputs.
        offset: The place of the first of `samples` in the sequence.
    """
    spans = _spans(layers, start, stop)
    first, end = spans[0]
    before = max(0, offset - first)
    part = samples[:, max(0, first - offset) : end - offset]
    x = functional.pad(part, (before, end - first - before - part.shape[1]))[:, None]
    for layer, (first, end) in zip(layers, spans, strict=True):
        places = torch.arange(first, end, device=x.device)
        is_outside = (places < 0) | (places >= limits)
        x = layer(x.masked_fill(is_outside[:, None], 0.0))
        limits = -(-limits // layer.stride)
    return x


def _limit(samples: Tensor, end: int) -> Tensor:
    return torch.full((1, 1), end, device=samples.device)


def _spans(layers: Iterable[Any], start: int, stop: int) -> list[tuple[int, int]]:
    """Finds the inputs of each layer that outputs [start, stop) of the last one depend on."""
    spans = []
    for layer in reversed(list(layers)):
        start = start * layer.stride - layer.left
        stop = (stop - 1) * layer.stride - layer.left + layer.kernel_size
        spans.append((start, stop))
    return spans[::-1]


def _total_stride(layers: Iterable[Any]) -> int:
    total = 1
    for layer in layers:
        total *= layer.stride
    return total
