"""Checks of what the audio model gets: one clear error for samples, lengths and texts."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from longnet_zoo.ops.arguments import can_read

__all__ = ["check_block", "check_lengths", "check_targets", "check_waveform"]


def check_waveform(waveform: Tensor, lengths: Tensor | None) -> None:
    """Checks samples, floating (batch, samples), and their lengths; values on the CPU only.

    Args:
        waveform: Samples; what lies beyond a length is not looked at.
        lengths: Real samples of each, or None.

    Raises:
        TypeError: If something is of a wrong type or dtype.
        ValueError: If shapes do not fit, a length is impossible or a sample is not finite.
    """
    if not isinstance(waveform, Tensor):
        raise TypeError(
            f"waveform must be a tensor (batch, samples), got {type(waveform).__name__}. "
            "Use torch.as_tensor(samples)."
        )
    if not waveform.is_floating_point():
        raise TypeError(
            f"waveform must be of a floating dtype, in [-1, 1], got {waveform.dtype}. Divide int16 "
            "by 32768."
        )
    if waveform.ndim != 2 or 0 in waveform.shape:
        cure = {
            1: " Add the batch with waveform[None].",
            3: " Mix channels with waveform.mean(dim=1).",
        }.get(waveform.ndim, "")
        raise ValueError(
            "waveform must be (batch, samples) with at least one sample, got "
            f"{tuple(waveform.shape)}.{cure}"
        )
    if lengths is not None:
        check_lengths(lengths, waveform.shape[0], waveform.shape[1])
    # Reading values would stall a GPU.
    if waveform.device.type == "cpu" and can_read(waveform):
        _check_finite(waveform, lengths)


def check_block(block: Tensor) -> Tensor:
    """Checks samples of a stream, floating (samples,), and returns them; there may be none."""
    if not isinstance(block, Tensor) or block.ndim != 1:
        got = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
        raise ValueError(f"blocks must be tensors (samples,), got {got}.")
    if block.numel():
        check_waveform(block[None], None)
    return block


def check_lengths(lengths: Tensor, batch: int, longest: int, *, name: str = "lengths") -> None:
    """Checks lengths: integers (batch,) from 1 to `longest`."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name} must be a tensor of int64 (batch,), got {got}.")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"{name} must be (batch,)=({batch},), got {tuple(lengths.shape)}.")
    if lengths.device.type == "cpu" and can_read(lengths):
        lowest, highest = torch.stack(lengths.aminmax()).tolist()
        if lowest < 1 or highest > longest:
            raise ValueError(
                f"{name} must be from 1 to the {longest} of the tensor, got values from {lowest} "
                f"to {highest}."
            )


def check_targets(
    targets: Tensor, target_lengths: Tensor, frames: list[int], *, num_classes: int, blank_id: int
) -> None:
    """Checks texts for CTC: symbols that exist, and few enough for the frames.

    A text needs a frame for each symbol and one more, for a blank, between two equal ones.

    Args:
        targets: Symbols, integers (batch, symbols).
        target_lengths: Symbols of each text, integers (batch,).
        frames: Frames of each sample.
        num_classes: Outputs of the head.
        blank_id: The output that stands for no symbol.

    Raises:
        TypeError: If something is not a tensor of integers.
        ValueError: If shapes do not fit, a symbol does not exist or a text is too long.
    """
    for name, x in (("targets", targets), ("target_lengths", target_lengths)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of int64, got {got}.")
    if targets.ndim != 2 or len(targets) != len(frames):
        raise ValueError(
            f"targets must be (batch, symbols) with batch={len(frames)}, got "
            f"{tuple(targets.shape)}."
        )
    if tuple(target_lengths.shape) != (len(frames),):
        raise ValueError(
            f"target_lengths must be (batch,)=({len(frames)},), got {tuple(target_lengths.shape)}."
        )
    texts = zip(targets.tolist(), target_lengths.tolist(), frames, strict=True)
    for number, (symbols, length, num_frames) in enumerate(texts):
        if not 0 <= length <= len(symbols):
            raise ValueError(
                f"target_lengths must be from 0 to the {len(symbols)} symbols of targets, got "
                f"{length} for sample {number}."
            )
        text = symbols[:length]
        wrong = [symbol for symbol in text if not 0 <= symbol < num_classes or symbol == blank_id]
        if wrong:
            raise ValueError(
                f"targets must be in [0, num_classes) with num_classes={num_classes}, and not "
                f"blank_id={blank_id}, got {wrong[0]} for sample {number}."
            )
        repeats = sum(a == b for a, b in pairwise(text))
        if length + repeats > num_frames:
            raise ValueError(
                f"a text needs a frame for each symbol and between equal ones, got {length} "
                f"symbols with {repeats} repeats for the {num_frames} frames of sample {number}. "
                "Shorten or drop it, or take smaller conv_strides."
            )


def _check_finite(waveform: Tensor, lengths: Tensor | None) -> None:
    is_wrong = ~waveform.isfinite()
    if lengths is not None and lengths.device.type == "cpu":
        is_wrong &= torch.arange(waveform.shape[1]) < lengths[:, None]
    if is_wrong.any():
        number, place = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            f"waveform must be finite, got {waveform[number, place].item()} at sample {place} of "
            f"number {number} in the batch. Repair or drop it."
        )
