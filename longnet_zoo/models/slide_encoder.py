"""Prov-GigaPath's slide encoder: LongNet over the tile embeddings of a whole slide.

Sizes and computation of the released model (Xu et al., "A whole-slide foundation model for digital
pathology from real-world data", Nature 2024; github.com/prov-gigapath/prov-gigapath): a linear map
of the tile embeddings plus fixed 2-D sin-cos positions, a class token, Magneto blocks with dilated
attention, and the class token or the mean of the tiles as the embedding of the slide. Positions are
computed for the tiles given, without a table of the whole grid.

Shape legend: b slides, n tiles, e embed_dim; the class token makes 1 + n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.ops.arguments import can_read
from longnet_zoo.registry import PublishedWeights, register_model

from .base import ZooModel, make_stack
from .checks import integer_list
from .heads import fit_module, masked_mean
from .slide_checks import check_coordinates, check_padding, check_slides
from .slide_config import GigaPathSlideConfig
from .slide_positions import grid_cells, sincos_positions

__all__ = [
    "GigaPathSlideEncoder",
    "gigapath_slide_enc12l768d",
    "gigapath_slide_enc12l1536d",
    "gigapath_slide_enc24l1024d",
]

_CLASS_TOKEN_STD = 0.02


class GigaPathSlideEncoder(ZooModel):
    """Embeds whole slides from the embeddings and coordinates of their tiles.

    Slides of a batch are padded on the right; their embeddings equal those of the slides one by
    one, and what padded tiles hold does not matter. Tile embeddings of any floating dtype are
    converted to that of the weights.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.

    Example:
        >>> model = GigaPathSlideEncoder(GigaPathSlideConfig(embed_dim=768, num_layers=12)).eval()
        >>> coords = 256 * torch.cartesian_prod(torch.arange(20), torch.arange(25))[None]
        >>> embedding = model(torch.randn(1, 500, 1536), coords)  # (1, 768)
    """

    config_class = GigaPathSlideConfig
    config: GigaPathSlideConfig

    def __init__(self, config: GigaPathSlideConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.tile_embed = nn.Linear(config.input_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dropout = nn.Dropout(config.dropout)
        self.stack = make_stack(config, position=None)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head = _make_head(config)
        nn.init.xavier_uniform_(self.tile_embed.weight)
        nn.init.zeros_(self.tile_embed.bias)
        nn.init.normal_(self.cls_token, std=_CLASS_TOKEN_STD)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.config.num_classes

    @property
    def embed_dim(self) -> int:
        """Channels of the tokens."""
        return self.config.embed_dim

    @property
    def num_features(self) -> int:
        """Channels of the embedding of a slide."""
        return self.config.embed_dim

    def forward(
        self,
        tile_embeddings: Tensor,
        coords: Tensor,
        padding_mask: Tensor | None = None,
        *,
        tile_size: int | None = None,
        check_coords: bool = True,
    ) -> Tensor:
        """Computes the embeddings of slides, or their logits if the model has a head.

        Args:
            tile_embeddings: Embeddings of the tiles, (batch, num_tiles, input_dim).
            coords: Upper left corners (x, y) of the tiles in pixels at level 0, integers or floats
                (batch, num_tiles, 2).
            padding_mask: Bool (batch, num_tiles), True = padding, which must be on the right.
            tile_size: Pixels from one tile to the next at level 0; None: that of the config.
            check_coords: Whether to check that tiles lie `tile_size` apart, one to a cell; False
                takes tiles that overlap or leave gaps. That coordinates are pixels inside the grid
                is checked all the same. While a graph is compiled, exported or captured, nothing
                of this is.

        Returns:
            Embeddings (batch, embed_dim), or logits (batch, num_classes).

        Raises:
            ValueError: If shapes do not fit, coordinates are not pixels at level 0 inside the
                grid, one to a cell, or a slide has no tile; the message names slide and tile.
            TypeError: If a tensor is of a wrong dtype.
        """
        features = self.forward_features(
            tile_embeddings, coords, padding_mask, tile_size=tile_size, check_coords=check_coords
        )
        return self.forward_head(features, padding_mask)

    def forward_features(
        self,
        tile_embeddings: Tensor,
        coords: Tensor,
        padding_mask: Tensor | None = None,
        *,
        tile_size: int | None = None,
        check_coords: bool = True,
    ) -> Tensor:
        """Computes the tokens that `forward_head` pools: the class token, then the tiles.

        They come from the encoder's last LayerNorm. The pooled embedding then passes `norm`, as
        published: `model.norm(features[:, 0])` is the embedding of a slide with `pool="cls"`. Rows
        of padded tiles mean nothing.

        Args:
            tile_embeddings: As for `forward`.
            coords: As for `forward`.
            padding_mask: As for `forward`.
            tile_size: As for `forward`.
            check_coords: As for `forward`.

        Returns:
            Tokens, (batch, 1 + num_tiles, embed_dim).

        Raises:
            ValueError: As for `forward`.
            TypeError: As for `forward`.
        """
        x, mask = self._embed(tile_embeddings, coords, padding_mask, tile_size, check_coords)
        return self.stack(x, key_padding_mask=mask)

    def forward_head(
        self, features: Tensor, padding_mask: Tensor | None = None, *, pre_logits: bool = False
    ) -> Tensor:
        """Pools tokens to the embeddings of slides and applies the head, if there is one.

        Args:
            features: Tokens, (batch, 1 + num_tiles, embed_dim).
            padding_mask: As for `forward`; the mean leaves padding out.
            pre_logits: Whether to return the embedding all the same.

        Returns:
            Embeddings (batch, embed_dim), or logits (batch, num_classes).
        """
        embedding = self.norm(self._pool(features, padding_mask))
        return embedding if pre_logits or self.head is None else self.head(embedding)

    def layer_embeddings(
        self,
        tile_embeddings: Tensor,
        coords: Tensor,
        padding_mask: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
        tile_size: int | None = None,
        check_coords: bool = True,
    ) -> Tensor:
        """Computes the embeddings of slides after some of the blocks.

        Layer i is the state after i blocks (0: what enters the first), pooled and passed through
        `norm`, but BEFORE the encoder's last LayerNorm: layer `num_layers` is not what `forward`
        returns. Published fine-tuning takes layer 11 of 12 by default: `layers=(11,)`.

        Args:
            tile_embeddings: As for `forward`.
            coords: As for `forward`.
            padding_mask: As for `forward`.
            layers: Numbers of blocks, from 0 to num_layers; None: all of them.
            tile_size: As for `forward`.
            check_coords: As for `forward`.

        Returns:
            Embeddings, (batch, len(layers), embed_dim).

        Raises:
            ValueError: If there is no such layer; else as for `forward`.
            TypeError: As for `forward`.
        """
        num_layers = self.config.num_layers
        numbers = integer_list("layers", range(num_layers + 1) if layers is None else layers)
        if not numbers or min(numbers) < 0 or max(numbers) > num_layers:
            raise ValueError(
                f"layers must be numbers of blocks from 0 to num_layers={num_layers}, got "
                f"{tuple(numbers)}."
            )
        x, mask = self._embed(tile_embeddings, coords, padding_mask, tile_size, check_coords)
        wanted = sorted(set(numbers))
        _, states = self.stack(x, key_padding_mask=mask, return_hidden_states=wanted)
        pooled = [self._pool(states[wanted.index(layer)], padding_mask) for layer in numbers]
        return self.norm(torch.stack(pooled, dim=1))

    def get_classifier(self) -> nn.Linear | None:
        """Returns the head; None without one."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a new one.

        Args:
            num_classes: Outputs; 0 removes the head, then `forward` returns embeddings.

        Raises:
            ValueError: If `num_classes` is negative.
            TypeError: If `num_classes` is not an integer.
        """
        self.config = replace(self.config, num_classes=num_classes)
        head = _make_head(self.config)
        self.head = None if head is None else fit_module(head, self)

    def no_weight_decay(self) -> set[str]:
        """Names the parameters for which weight decay makes no sense: also the class token."""
        return super().no_weight_decay() | {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Gives timm the groups of parameters for layer decay: stem, blocks, head.

        Args:
            coarse: Whether all blocks make one group.
        """
        blocks = r"^stack\.blocks" if coarse else r"^stack\.blocks\.(\d+)"
        return {
            "stem": r"^cls_token|^tile_embed",
            "blocks": [(blocks, None), (r"^stack\.norm|^norm", (99999,))],
        }

    def flops(self, seq_len: int) -> int:
        """Counts the FLOPs of a forward pass over one slide; see `ZooModel`.

        Args:
            seq_len: Number of tiles.
        """
        head = 0 if self.head is None else 2 * self.head.weight.numel()
        return 2 * self.tile_embed.weight.numel() * seq_len + super().flops(1 + seq_len) + head

    def _embed(
        self,
        tiles: Tensor,
        coords: Tensor,
        padding_mask: Tensor | None,
        tile_size: int | None,
        check_coords: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Checks the inputs; makes tokens (b, 1 + n, e) and their padding mask (b, 1 + n)."""
        config = self.config
        tile_size = config.tile_size if tile_size is None else tile_size
        check_slides(tiles, coords, padding_mask, tile_size=tile_size, input_dim=config.input_dim)
        if can_read(coords):
            if padding_mask is not None:
                check_padding(padding_mask)
            check_coordinates(
                coords,
                padding_mask,
                tile_size=tile_size,
                grid_size=config.grid_size,
                check_spacing=check_coords,
            )
        coords = coords if coords.is_floating_point() else coords.to(torch.int64)
        mask = None
        if padding_mask is not None:
            is_padding = padding_mask[..., None]
            tiles, coords = tiles.masked_fill(is_padding, 0.0), coords.masked_fill(is_padding, 0)
            mask = functional.pad(padding_mask, (1, 0))
        cells = grid_cells(coords, tile_size)
        positions = sincos_positions(cells, config.embed_dim, grid_size=config.grid_size)
        x = self.tile_embed(tiles.to(self.tile_embed.weight.dtype)) + positions
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x.to(cls_token.dtype)], dim=1)
        return self.dropout(x), mask

    def _pool(self, features: Tensor, padding_mask: Tensor | None) -> Tensor:
        if self.config.pool == "cls":
            return features[:, 0]
        return masked_mean(features[:, 1:], padding_mask)


def _make_head(config: GigaPathSlideConfig) -> nn.Linear | None:
    if config.num_classes == 0:
        return None
    head = nn.Linear(config.embed_dim, config.num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


_register = partial(
    register_model,
    family="gigapath_slide",
    modality="slide",
    source="github.com/prov-gigapath/prov-gigapath",
)


@_register(
    "gigapath_slide_enc12l768d",
    config=GigaPathSlideConfig(embed_dim=768, num_layers=12),
    description="the released Prov-GigaPath slide encoder",
    weights=(
        PublishedWeights(
            tag="prov_gigapath",
            location="hf_hub:prov-gigapath/prov-gigapath/slide_encoder.pth",
            licence="Apache-2.0 code; weights under the terms on the model's page",
            note="gated: ask for access on its page, then log in with `hf auth login`",
        ),
    ),
)
def gigapath_slide_enc12l768d(config: GigaPathSlideConfig) -> GigaPathSlideEncoder:
    """Builds the released model, 86M parameters."""
    return GigaPathSlideEncoder(config)


@_register(
    "gigapath_slide_enc24l1024d",
    config=GigaPathSlideConfig(embed_dim=1024, num_layers=24),
    description="Prov-GigaPath's configuration of 304M parameters",
)
def gigapath_slide_enc24l1024d(config: GigaPathSlideConfig) -> GigaPathSlideEncoder:
    """Builds the configuration with 24 layers, 304M parameters."""
    return GigaPathSlideEncoder(config)


@_register(
    "gigapath_slide_enc12l1536d",
    config=GigaPathSlideConfig(embed_dim=1536, num_layers=12),
    description="Prov-GigaPath's configuration of 343M parameters",
)
def gigapath_slide_enc12l1536d(config: GigaPathSlideConfig) -> GigaPathSlideEncoder:
    """Builds the wide configuration, 343M parameters."""
    return GigaPathSlideEncoder(config)
