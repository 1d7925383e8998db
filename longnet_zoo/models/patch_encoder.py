"""The part of a vision model below its head: patches, positions, stack; with timm's methods.

Shape legend: b batch, n patches in row-major order, e embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from einops import rearrange
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .base import ZooModel, make_stack
from .checks import check_mask, integer_list
from .longvit_config import LongViTConfig, data_config
from .patches import PatchEmbed, resize_positions
from .pixels import Pixels, embed_strips

__all__ = ["PatchEncoder", "block_numbers", "init_weight"]

# torchscale's `trunc_normal_`: standard deviation 0.02, cut at one standard deviation.
_INIT_STD = 0.02
# Of the LayerNorm that DINO pretraining ends in (`pretraining/vision_transformer.py`).
_DINO_NORM_EPS = 1e-6


class PatchEncoder(ZooModel):
    """Makes features of the patches of an image.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.
    """

    config_class = LongViTConfig
    config: LongViTConfig

    def __init__(self, config: LongViTConfig) -> None:
        super().__init__(config)
        self.embed_dim = self.num_features = config.embed_dim
        self.patch_embed = PatchEmbed(
            patch_size=config.patch_size, in_chans=config.in_chans, embed_dim=config.embed_dim
        )
        self.pos_embed = nn.Parameter(torch.empty(1, config.usual_seq_len, config.embed_dim))
        init_weight(self.pos_embed)
        self.dropout = nn.Dropout(config.dropout)
        # The stack has its final initial values by now: nothing may be applied to it after this.
        self.stack = make_stack(config, position=None, final_norm=False)
        self.norm: nn.Module = nn.Identity()
        if config.final_norm:
            self.norm = nn.LayerNorm(config.embed_dim, eps=_DINO_NORM_EPS)
        self.feature_info = [
            {
                "module": f"stack.blocks.{layer}",
                "num_chs": config.embed_dim,
                "reduction": config.patch_size,
            }
            for layer in range(config.num_layers)
        ]
        # What timm's `resolve_data_config` reads; timm puts its own here for a model it makes.
        self._data_config = data_config(config)
        self.pretrained_cfg = self.default_cfg = self._data_config

    def forward_features(self, images: Tensor) -> Tensor:
        """Computes the features of all patches, (batch, patches, embed_dim); see `forward`."""
        return self.forward_tokens(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """Embeds patches and adds positions: (batch, patches, embed_dim); see `forward`."""
        tokens = self.patch_embed(images)
        return self._add_positions(tokens, self.patch_embed.grid_size(*images.shape[-2:]))

    def embed_pixels(
        self,
        pixels: Pixels,
        *,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        size: tuple[int, int] | None = None,
        strip_patches: int = 8,
    ) -> Tensor:
        """Embeds an image that is too large for memory, one strip of patches at a time.

        Equal to `embed` of the whole image. The backward pass reads the strips once more.

        Args:
            pixels: Anything with `shape` (height, width, in_chans) whose `[top:bottom,
                left:right]` gives pixels: a NumPy array or memmap, a zarr or tifffile array,
                `SlidePixels`. uint8 in [0, 255], or floating in [0, 1].
            mean: Mean of each channel, for pixels in [0, 1].
            std: Standard deviation of each channel.
            size: Height and width of the part to embed, from the top left corner; None: all.
            strip_patches: Rows of patches read at once.

        Returns:
            Tokens for `forward_tokens`, (1, patches, embed_dim).

        Raises:
            ValueError: If shapes do not fit the model or an option is outside its range.
            TypeError: If `pixels` cannot be read like this, or have another dtype.
        """
        tokens, grid = embed_strips(
            self.patch_embed, pixels, mean=mean, std=std, size=size, strip_patches=strip_patches
        )
        return self._add_positions(tokens, grid)

    def forward_tokens(self, tokens: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Computes features of embedded patches, (batch, patches, embed_dim).

        Args:
            tokens: What `embed` or `embed_pixels` returns; images of different sizes are padded
                after embedding.
            key_padding_mask: Bool (batch, patches), True = padding; what such tokens hold does not
                matter.

        Returns:
            Features, (batch, patches, embed_dim).

        Raises:
            ValueError: If the mask is of another shape.
            TypeError: If it is not bool.
        """
        if key_padding_mask is not None:
            check_mask("key_padding_mask", key_padding_mask, tuple(tokens.shape[:2]))
            tokens = tokens.masked_fill(key_padding_mask[..., None], 0.0)
        return self.norm(self.stack(tokens, key_padding_mask=key_padding_mask))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Computes features and what some of the blocks return.

        Args:
            images: As for `forward`.
            indices: Blocks to take: the last n, or their numbers from 0 (negative from the end);
                None: all.
            norm: Whether they pass the final norm, if the model has one.
            stop_early: Whether to leave out the blocks after the last one taken.
            output_fmt: "NCHW" (batch, embed_dim, rows, columns) or "NLC" (batch, patches,
                embed_dim).
            intermediates_only: Whether to return the list alone.

        Returns:
            Features after the last block that ran and the final norm, and the list; or the list.

        Raises:
            ValueError: If an index or `output_fmt` is none of these, or as for `forward`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        taken = block_numbers(indices, len(self.stack.blocks))
        num_blocks = max(taken) + 1 if stop_early else None
        x, states = self.stack(
            self.embed(images),
            num_blocks=num_blocks,
            return_hidden_states=[number + 1 for number in taken],
        )
        intermediates = [self.norm(state) for state in states] if norm else states
        if output_fmt == "NCHW":
            rows = images.shape[-2] // self.config.patch_size
            pattern = "b (rows columns) e -> b e rows columns"
            intermediates = [rearrange(y, pattern, rows=rows).contiguous() for y in intermediates]
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """Returns what some of the blocks return, by the interface of DINO.

        Args:
            images: As for `forward`.
            n: The last n blocks, or their numbers.
            reshape: Whether to return (batch, embed_dim, rows, columns) rather than tokens.
            return_prefix_tokens: Must be False: there is no class token.
            norm: Whether they pass the final norm, if the model has one.

        Raises:
            ValueError: If prefix tokens are asked for, or as for `forward_intermediates`.
        """
        if return_prefix_tokens:
            raise ValueError(
                "return_prefix_tokens must be False, got True: LongViT has no class token. "
                "Use the mean of the tokens."
            )
        found = self.forward_intermediates(
            images,
            n,
            norm=norm,
            stop_early=True,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )
        assert isinstance(found, list)
        return found

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
    ) -> None:
        """Changes the image and patch size that the weights are for.

        The position table is interpolated as `forward` does it, the patch embedding resampled as
        in FlexiViT (arXiv 2212.08013).

        Args:
            img_size: Pixels, one number or (height, width); None: as it is.
            patch_size: Side of a patch in pixels; None: as it is.

        Raises:
            ValueError: If the image is not made of whole patches.
        """
        old = self.config
        img_size = old.img_size if img_size is None else img_size
        patch_size = old.patch_size if patch_size is None else patch_size
        self.config = replace(old, img_size=img_size, patch_size=patch_size)
        with torch.no_grad():
            table = resize_positions(self.pos_embed, old_grid=old.grid, new_grid=self.config.grid)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        if patch_size != old.patch_size:
            self.patch_embed = self.patch_embed.resampled(patch_size)
        for info in self.feature_info:
            info["reduction"] = patch_size
        self._describe_data()

    def no_weight_decay(self) -> set[str]:
        """Names the parameters for which weight decay makes no sense: norms, biases, positions."""
        return super().no_weight_decay() | {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups parameters by depth for layer decay, in timm's format.

        Args:
            coarse: Whether all blocks are one group.
        """
        blocks = r"^stack\.blocks" if coarse else [(r"^stack\.blocks\.(\d+)", None)]
        return {"stem": r"^pos_embed|^patch_embed", "blocks": blocks}

    def _describe_data(self) -> None:
        """Keeps our own description of the images right; one of timm's is about its weights."""
        self._data_config.update(data_config(self.config))

    def _add_positions(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        table = resize_positions(self.pos_embed, old_grid=self.config.grid, new_grid=grid)
        return self.dropout(tokens + table)


def init_weight(weight: Tensor) -> None:
    """Sets a position table or the weight of a head to its initial values, in place."""
    nn.init.trunc_normal_(weight, std=_INIT_STD, a=-_INIT_STD, b=_INIT_STD)


def block_numbers(indices: int | Sequence[int] | None, num_layers: int) -> list[int]:
    """Lists the blocks wanted by their numbers from 0, in order."""
    if indices is None:
        return list(range(num_layers))
    if type(indices) is int:
        if not 1 <= indices <= num_layers:
            raise ValueError(
                f"the number of last blocks must be in [1, {num_layers}], got {indices}."
            )
        return list(range(num_layers - indices, num_layers))
    numbers = integer_list("indices", indices)  # type: ignore[arg-type]
    if not numbers or min(numbers) < -num_layers or max(numbers) >= num_layers:
        raise ValueError(
            f"indices must be numbers of the {num_layers} blocks, in "
            f"[{-num_layers}, {num_layers}), got {numbers}."
        )
    return sorted({index % num_layers for index in numbers})
