"""Images to patch tokens: the embedding, and its table of positions for any grid.

Shape legend: b batch, e embed_dim; a grid is (rows, columns) of patches.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import resample_patch_embed
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PatchEmbed", "resize_positions"]

# DINO adds it to the new grid before it divides, so that rounding never loses a row
# (github.com/facebookresearch/dino/issues/8). LongViT was trained with crops resized like this.
_DINO_OFFSET = 0.1


class PatchEmbed(nn.Module):
    """Embeds square patches by one linear map, a convolution whose stride is its kernel.

    Args:
        patch_size: Side of a patch in pixels.
        in_chans: Channels of an image.
        embed_dim: Channels of a token.
    """

    def __init__(self, *, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images (batch, in_chans, height, width) row by row, to (batch, patches, e).

        Images of any floating dtype are converted to that of the weights.

        Raises:
            ValueError: If the images have another number of channels, or no whole patches.
            TypeError: If they are not of a floating dtype.
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans or 0 in images.shape:
            raise ValueError(
                f"images must be (batch, in_chans, height, width) with in_chans={self.in_chans}, "
                f"got {tuple(images.shape)}."
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images must be normalised and of a floating dtype, got {images.dtype}. "
                "Use a transform, or embed_pixels for pixels in [0, 255]."
            )
        self.grid_size(images.shape[2], images.shape[3])
        patches = self.proj(images.to(self.proj.weight.dtype))
        return rearrange(patches, "b e rows columns -> b (rows columns) e")

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Counts the patches of an image: (rows, columns).

        Raises:
            ValueError: If the image is not made of whole patches.
        """
        size = self.patch_size
        if height < size or width < size or height % size or width % size:
            raise ValueError(
                f"height and width must be multiples of patch_size={size}, got "
                f"{height} x {width}. Crop, pad or resize the image to whole patches."
            )
        return height // size, width // size

    def resampled(self, patch_size: int) -> PatchEmbed:
        """Makes the embedding of another patch size, as FlexiViT does (arXiv 2212.08013)."""
        weight = self.proj.weight.detach()
        new = PatchEmbed(
            patch_size=patch_size, in_chans=self.in_chans, embed_dim=self.proj.out_channels
        )
        new.to(device=weight.device, dtype=weight.dtype).train(self.training)
        resampled = resample_patch_embed(weight, [patch_size, patch_size])
        new.load_state_dict({**self.state_dict(), "proj.weight": resampled})
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(self.get_parameter(name).requires_grad)
        return new


def resize_positions(
    table: Tensor,
    *,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    offset: float = _DINO_OFFSET,
) -> Tensor:
    """Interpolates a table of positions bicubically to another grid.

    Args:
        table: One row per patch, (1, rows * columns, embed_dim).
        old_grid: Rows and columns of the table.
        new_grid: Rows and columns wanted.
        offset: Added to the new grid to get the scale, as DINO and LongViT do while a model runs;
            0: the plain scale, as LongViT's loader does with weights.

    Returns:
        The table of the new grid, in the same dtype; `table` itself where the grids are equal.
    """
    if old_grid == new_grid:
        return table
    # Not the parameter itself goes to einops: it notes every type it sees, and compiled code is
    # compiled anew when that note changes.
    image = rearrange(table.unflatten(1, old_grid).float(), "b rows columns e -> b e rows columns")
    if torch.compiler.is_compiling():
        # The same by a formula: torch's kernel takes its scale as a constant, hence would be
        # compiled anew for every size.
        for dim, size in zip((2, 3), new_grid, strict=True):
            image = _resize_axis(image, dim, size, offset)
    elif offset:
        scale = [(new + offset) / old for old, new in zip(old_grid, new_grid, strict=True)]
        image = functional.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = functional.interpolate(image, size=new_grid, mode="bicubic")
    return rearrange(image, "b e rows columns -> b (rows columns) e").to(table.dtype)


def _resize_axis(x: Tensor, dim: int, size: int, offset: float) -> Tensor:
    """Interpolates along an axis by the cubic convolution of four neighbours (a = -0.75)."""
    old_size = x.shape[dim]
    places = torch.arange(size, device=x.device, dtype=torch.float32)
    centres = (places + 0.5) * (old_size / (size + offset)) - 0.5
    total = torch.zeros((), device=x.device)
    for neighbour in (-1, 0, 1, 2):
        rows = centres.floor() + neighbour
        distance = (centres - rows).abs()
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        weights = torch.where(distance <= 1, near, far)
        taken = x.index_select(dim, rows.clamp(0, old_size - 1).long())
        total = total + taken * weights.view(-1, *(1,) * (x.ndim - 1 - dim))
    return total
