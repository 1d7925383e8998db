"""Weights of Prov-GigaPath's slide encoder, both ways.

Facts from `gigapath/slide_encoder.py` of github.com/prov-gigapath/prov-gigapath, commit 09d8e87.
The classifier of a fine-tuned published model has no counterpart: it reads states after some of the
blocks (`layer_embeddings`), not the embedding that our head reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longnet_zoo.models.slide_config import GigaPathSlideConfig
from longnet_zoo.models.slide_encoder import GigaPathSlideEncoder
from longnet_zoo.models.slide_positions import sincos_positions

from .keys import (
    Converter,
    layer_names,
    parameter_names,
    published_names,
    refuse_unpublished,
    rename,
)

__all__ = ["CONVERTER"]

_OUTER_NAMES = {
    "patch_embed.proj": "tile_embed",
    "encoder.layer_norm": "stack.norm",
    "norm": "norm",
}
_POSITIONS = "pos_embed"
_NUM_COMPARED_CELLS = 1009


def _is_published(state_dict: Mapping[str, Tensor]) -> bool:
    return "patch_embed.proj.weight" in state_dict


def _from_published(
    state_dict: Mapping[str, Tensor], config: GigaPathSlideConfig
) -> dict[str, Tensor]:
    weights = dict(state_dict)
    positions = weights.pop(_POSITIONS, None)
    if positions is not None:
        _check_positions(positions, config)
    return rename(weights, _key_table(config.num_layers), family="GigaPath")


def _to_published(model: GigaPathSlideEncoder) -> dict[str, Tensor]:
    config = model.config
    wanted: dict[str, tuple[object, ...]] = {
        "norm": ("sub_ln",),
        "num_classes": (0,),
        **{name: (value,) for name, value in CONVERTER.options.items()},
    }
    refuse_unpublished(config, wanted, code="GigaPath's code")
    return published_names(model, _key_table(config.num_layers))


def _key_table(num_layers: int) -> dict[str, str]:
    layers = layer_names(num_layers, published="encoder.layers", ours="stack.blocks")
    return {"cls_token": "cls_token", **parameter_names({**_OUTER_NAMES, **layers})}


def _check_positions(positions: Tensor, config: GigaPathSlideConfig) -> None:
    """Compares a table of positions, (1, 1 + grid_size^2, embed_dim), with ours at some cells."""
    grid_size = config.grid_size
    expected_shape = (1, 1 + grid_size**2, config.embed_dim)
    if positions.shape != expected_shape:
        raise ValueError(
            f"{_POSITIONS} must be (1, 1 + grid_size^2, embed_dim) = {expected_shape}, got "
            f"{tuple(positions.shape)}. Check grid_size and embed_dim."
        )
    # Row 0 is the class token's; cell (x, y) has row 1 + x * grid_size + y.
    rows = torch.linspace(0, grid_size**2 - 1, _NUM_COMPARED_CELLS).long()
    cells = torch.stack([rows // grid_size, rows % grid_size], dim=1)
    expected = sincos_positions(cells, config.embed_dim, grid_size=grid_size)
    error = max(
        (positions[0, 1 + rows].float() - expected).abs().max().item(),
        positions[0, 0].abs().max().item(),
    )
    rounding = torch.finfo(positions.dtype).eps if positions.is_floating_point() else 0.0
    if not error <= max(1e-5, rounding):
        raise ValueError(
            f"{_POSITIONS} must hold the fixed sin-cos positions of the grid, got values off by up "
            f"to {error:.3g}."
        )


CONVERTER = Converter(
    is_published=_is_published,
    from_published=_from_published,
    to_published=_to_published,
    options={"head_offset": "block", "padded_keys": "zero"},
)
