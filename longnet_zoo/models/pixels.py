"""Images larger than memory: patches embedded strip by strip from pixels that are read lazily.

Shape legend: e embed_dim; a grid is (rows, columns) of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .patches import PatchEmbed

__all__ = ["Pixels", "SlidePixels", "embed_strips"]


class Pixels(Protocol):
    """An image that is read in parts: a NumPy array or memmap, a zarr or tifffile array, ..."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        ...

    def __getitem__(self, key: tuple[slice, slice], /) -> Any:
        """The part `[top:bottom, left:right]`, as what `numpy.asarray` takes."""
        ...


class SlidePixels:
    """Shows one level of an openslide-like slide as an array of RGB pixels that is read lazily.

    Transparent pixels, which a scanner has not seen, keep their colour, as in the published
    preprocessing.

    Args:
        slide: Object with openslide's `level_dimensions`, `level_downsamples` and `read_region`.
        level: Level to read, 0 is the largest.

    Raises:
        ValueError: If there is no such level.

    Example:
        >>> pixels = SlidePixels(openslide.OpenSlide("slide.svs"), level=1)
        >>> tokens = model.embed_pixels(pixels, size=(32768, 32768))
    """

    def __init__(self, slide: Any, *, level: int = 0) -> None:
        levels = len(slide.level_dimensions)
        if not 0 <= level < levels:
            raise ValueError(f"level must be in [0, {levels}), the slide's levels, got {level}.")
        self.slide = slide
        self.level = level

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, 3)."""
        width, height = self.slide.level_dimensions[self.level]
        return height, width, 3

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        """Reads `[top:bottom, left:right]` as uint8 (rows, columns, 3).

        Raises:
            TypeError: If the key is not of two slices without steps.
        """
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) != 2 or any(
            not isinstance(part, slice) or part.step not in (None, 1) for part in parts
        ):
            raise TypeError(f"slides are read as pixels[top:bottom, left:right], got {key!r}.")
        height, width, _ = self.shape
        (top, bottom, _), (left, right, _) = parts[0].indices(height), parts[1].indices(width)
        # openslide takes the corner in pixels of level 0, and the size in pixels of the level.
        downsample = self.slide.level_downsamples[self.level]
        corner = (round(left * downsample), round(top * downsample))
        region = self.slide.read_region(corner, self.level, (right - left, bottom - top))
        return np.asarray(region.convert("RGB"))


def embed_strips(
    embed: PatchEmbed,
    pixels: Pixels,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int] | None,
    strip_patches: int,
) -> tuple[Tensor, tuple[int, int]]:
    """Embeds the patches of an image without ever holding more of it than one strip.

    The backward pass reads the strips once more, so memory is that of a strip in training too.

    Args:
        embed: The patch embedding.
        pixels: The image.
        mean: What to subtract from each channel, for pixels in [0, 1].
        std: What to divide each channel by after that.
        size: Height and width of the part to embed, from the top left corner; None: all.
        strip_patches: Rows of patches per strip.

    Returns:
        Tokens, (1, patches, embed_dim), on the device of the embedding, and their grid.

    Raises:
        ValueError: If shapes do not fit or an option is outside its range.
        TypeError: If `pixels` cannot be read in parts, or have another dtype.
    """
    channel_mean = _channel_values("mean", mean, embed.in_chans)
    channel_std = _channel_values("std", std, embed.in_chans)
    if not (channel_std > 0).all():
        raise ValueError(f"std must be above 0, got {std!r}. Take 1 for a constant channel.")
    if type(strip_patches) is not int or strip_patches < 1:
        raise ValueError(f"strip_patches must be an integer of at least 1, got {strip_patches!r}.")
    height, width = _pixel_size(pixels, size)
    grid = embed.grid_size(height, width)
    step = strip_patches * embed.patch_size
    run = partial(_embed_strip, embed, pixels, channel_mean, channel_std, width)
    tokens = [
        checkpoint(
            run,
            slice(top, min(top + step, height)),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for top in range(0, height, step)
    ]
    return torch.cat(tokens, dim=1), grid


def _channel_values(name: str, values: Sequence[float], in_chans: int) -> Tensor:
    try:
        numbers = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}.") from error
    if numbers.shape != (in_chans,) or not numbers.isfinite().all():
        raise ValueError(
            f"{name} must have one finite number per channel, in_chans={in_chans}, got {values!r}."
        )
    return numbers


def _pixel_size(pixels: Pixels, size: tuple[int, int] | None) -> tuple[int, int]:
    shape = getattr(pixels, "shape", None)
    if shape is None or not hasattr(pixels, "__getitem__"):
        raise TypeError(
            "pixels must have shape and [top:bottom, left:right], got "
            f"{type(pixels).__name__}. Use numpy.asarray(image), or SlidePixels for a slide."
        )
    if len(shape) != 3:
        raise ValueError(f"pixels must be (height, width, in_chans), got {tuple(shape)}.")
    if size is None:
        return shape[0], shape[1]
    if not isinstance(size, (tuple, list)) or [type(side) for side in size] != [int, int]:
        raise TypeError(f"size must be two integers, (height, width), got {size!r}.")
    if not (0 < size[0] <= shape[0] and 0 < size[1] <= shape[1]):
        raise ValueError(
            f"size must be (height, width) within the {shape[0]} x {shape[1]} pixels, got {size}."
        )
    return size[0], size[1]


def _embed_strip(
    embed: PatchEmbed, pixels: Pixels, mean: Tensor, std: Tensor, width: int, strip: slice
) -> Tensor:
    part = torch.tensor(np.asarray(pixels[strip, slice(0, width)]))
    wanted = (strip.stop - strip.start, width, embed.in_chans)
    if part.shape != wanted:
        raise ValueError(
            f"pixels[{strip.start}:{strip.stop}, 0:{width}] must be (rows, columns, in_chans)="
            f"{wanted}, got {tuple(part.shape)}."
        )
    if part.dtype != torch.uint8 and not part.is_floating_point():
        raise TypeError(
            f"pixels must be uint8, or of a floating dtype in [0, 1], got {part.dtype}. "
            "Scale other integers."
        )
    if part.is_floating_point():
        lowest, highest = torch.stack(part.aminmax()).tolist()
        if not (lowest >= 0 and highest <= 1):
            raise ValueError(
                f"pixels of a floating dtype must be in [0, 1], not yet normalised, got values "
                f"from {lowest:.7g} to {highest:.7g} in rows {strip.start}:{strip.stop}. "
                "Divide those in [0, 255] by 255, or pass uint8."
            )
    scale = 1 / (std * 255 if part.dtype == torch.uint8 else std)
    # Channels first while they are bytes, then in place: memory traffic is what takes the time.
    images = part.permute(2, 0, 1).contiguous().float()[None]
    images = images.mul_(scale[:, None, None]).sub_((mean / std)[:, None, None])
    return embed(images.to(embed.proj.weight.device))
