"""Weights of LongViT, published by microsoft/torchscale (`examples/longvit`), and back.

Three kinds of file hold the same encoder:

| file | encoder | besides |
|---|---|---|
| LongViT itself | `pos_embed`, `encoder.layers.0...` | - |
| fine-tuned classifier | the same after `model.` | `fc_norm`, `head` |
| DINO teacher or student | the same after `backbone.` | `backbone.norm`; a projection head |

DINO's projection head (`head.mlp`, `head.last_layer`) is of no use after pretraining and left out.
Its final norm is loaded with `final_norm=True`, and otherwise left out as in the published
fine-tuning (`utils.py`, `load_model_and_may_interpolate`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor

from longnet_zoo.models import LongViT, LongViTConfig
from longnet_zoo.models.patches import resize_positions

from .keys import (
    Converter,
    layer_names,
    parameter_names,
    published_names,
    refuse_unpublished,
    rename,
    without_prefix,
)
from .load import head_cure

__all__ = ["CONVERTER", "fit_to_images"]

_PREFIX = re.compile(r"^(model|backbone)\.")
_PROJECTION_HEAD = re.compile(r"^head\.(mlp|last_layer)\.")
_POSITIONS, _FIRST_CONV, _HEAD = "pos_embed", "patch_embed.proj.weight", "head.weight"
# adapt_input_conv knows how to make other numbers of channels of this one.
_RGB = 3


def fit_to_images(state_dict: Mapping[str, Tensor], config: LongViTConfig) -> dict[str, Tensor]:
    """Fits weights to the image size and channels of a config.

    A square position table is resized bicubically as LongViT's loader does it (but not rounded to
    float16), and the first convolution of RGB images adapted as in timm.

    Args:
        state_dict: Weights under our names.
        config: The model they are for.
    """
    fitted = dict(state_dict)
    table = fitted.get(_POSITIONS)
    if table is not None and table.ndim == 3:
        side = math.isqrt(table.shape[1])
        if side**2 == table.shape[1]:
            fitted[_POSITIONS] = resize_positions(
                table, old_grid=(side, side), new_grid=config.grid, offset=0
            )
    conv = fitted.get(_FIRST_CONV)
    if conv is not None and conv.ndim == 4 and conv.shape[1] == _RGB != config.in_chans:
        fitted[_FIRST_CONV] = adapt_input_conv(config.in_chans, conv)
    return fitted


def _is_published(state_dict: Mapping[str, Tensor]) -> bool:
    return any(_PREFIX.sub("", key).startswith("encoder.layers.") for key in state_dict)


def _from_published(state_dict: Mapping[str, Tensor], config: LongViTConfig) -> dict[str, Tensor]:
    useful = {key: x for key, x in state_dict.items() if not _PROJECTION_HEAD.match(key)}
    plain = without_prefix(useful, _PREFIX, family="LongViT")
    if not config.final_norm:
        plain = {key: tensor for key, tensor in plain.items() if not key.startswith("norm.")}
    if _HEAD in plain and not config.num_classes:
        cure = {"cure": head_cure("num_classes", len(plain[_HEAD]))}
    else:
        cure = {}
    return fit_to_images(rename(plain, _key_table(config), family="LongViT", **cure), config)


def _to_published(model: LongViT) -> dict[str, Tensor]:
    config = model.config
    _check_published_has(config)
    plain = published_names(model, _key_table(config))
    if config.num_classes:
        is_outer = re.compile(r"^(fc_norm|head)\.").match
        return {key if is_outer(key) else f"model.{key}": x for key, x in plain.items()}
    prefix = "backbone." if config.final_norm else ""
    return {f"{prefix}{key}": tensor for key, tensor in plain.items()}


def _key_table(config: LongViTConfig) -> dict[str, str]:
    """Published key, without its prefix -> our key."""
    outer = ["patch_embed.proj"]
    outer += ["norm"] * config.final_norm + ["fc_norm", "head"] * (config.num_classes > 0)
    modules = {name: name for name in outer}
    modules |= layer_names(config.num_layers, published="encoder.layers", ours="stack.blocks")
    return {_POSITIONS: _POSITIONS, **parameter_names(modules)}


def _check_published_has(config: LongViTConfig) -> None:
    """Refuses options with which the published code would compute something else."""
    rows, columns = config.grid
    wanted: dict[str, tuple[object, ...]] = {
        "norm": ("sub_ln",),
        "eps": (1e-5,),
        "global_pool": ("avg",),
        "img_size": (config.img_size,) if rows == columns else ("a square",),
        "final_norm": (False,) if config.num_classes else (False, True),
        "padded_keys": ("zero",),
    }
    if max(config.dilation_rates) > 1:
        wanted["head_offset"] = ("block",)
    refuse_unpublished(config, wanted, code="the published LongViT")


CONVERTER = Converter(
    is_published=_is_published,
    from_published=_from_published,
    to_published=_to_published,
    options={"head_offset": "block", "padded_keys": "zero"},
)
