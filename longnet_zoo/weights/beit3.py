"""Weights of BEiT-3 as released by microsoft/unilm, both ways.

Released files have the backbone under `beit3.`, weights of images under `.A.` and of texts under
`.B.`, and the heads beside it. Facts from microsoft/torchscale, `model/BEiT3.py` (commit 4d1e0e8),
and microsoft/unilm, `beit3/modeling_finetune.py` and `beit3/utils.py`.

Two things are adapted to the model on the way in, both on the caller's word:

- Positions of images: for another `img_size` the table is interpolated bicubically, without the row
  of the class token, as published.
- Positions of texts: for a smaller `max_text_len` the table is cut; for a larger one it is
  repeated, as Longformer did with RoBERTa's (arXiv 2004.05150, Sec. 5). Texts that fit the released
  table thus keep their outputs to the last bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from longnet_zoo.models import BEiT3, BEiT3Config

from .keys import (
    Converter,
    layer_names,
    parameter_names,
    published_names,
    refuse_unpublished,
    rename,
    without_prefix,
)

__all__ = ["CONVERTER", "beit3_names", "dense_segments"]

_PREFIX = "beit3."
_IMAGE_POSITIONS = "encoder.embed_positions.A.weight"
_TEXT_POSITIONS = "encoder.embed_positions.B.weight"
# A table of positions begins with two rows that are never read; that of images goes on with the
# class token.
_UNUSED_ROWS = 2
_IMAGE_EXTRA_ROWS = _UNUSED_ROWS + 1

_IMAGE_NAMES = {
    "vision_embed.cls_token": "image_embed.cls_token",
    "vision_embed.mask_token": "image_embed.mask_token",
    _IMAGE_POSITIONS: "image_embed.positions.weight",
    **parameter_names({"vision_embed.proj": "image_embed.proj"}),
}
_TEXT_NAMES = {
    "text_embed.weight": "text_embed.tokens.weight",
    _TEXT_POSITIONS: "text_embed.positions.weight",
}
_RETRIEVAL_NAMES = {
    "vision_head.weight": "retrieval_head.vision_head.weight",
    "language_head.weight": "retrieval_head.language_head.weight",
    "logit_scale": "retrieval_head.logit_scale",
}
_TOKEN_CLASSIFIER_NAMES = {
    "pooler.norm": "classifier.norm",
    "pooler.dense": "classifier.pooler",
    "head.0": "classifier.head.0",
    "head.1": "classifier.head.1",
    "head.3": "classifier.head.3",
}
_PATCH_CLASSIFIER_NAMES = {"fc_norm": "classifier.norm", "head": "classifier.head"}
# How the names of all released heads begin.
_PRETRAINING_HEADS = {
    "masked_image": ("mim_head.",),
    "masked_text": ("mlm_head.",),
    "retrieval": ("vision_head.", "language_head.", "logit_scale"),
}
_CLASSIFIER = ("pooler.", "fc_norm.", "head.")
_HEADS = (*(x for names in _PRETRAINING_HEADS.values() for x in names), *_CLASSIFIER)


def _is_published(state_dict: Mapping[str, Tensor]) -> bool:
    return any(key.removeprefix(_PREFIX).startswith("vision_embed.") for key in state_dict)


def _from_published(state_dict: Mapping[str, Tensor], config: BEiT3Config) -> dict[str, Tensor]:
    """Renames released weights for the model that a config describes.

    A file often holds more than a model needs. Left out are: heads that the model does not have,
    the last norm for `final_norm=False`, and what is for texts alone for `vocab_size=None`.

    Args:
        state_dict: Weights under unilm's names, with or without `beit3.`.
        config: Config of our model.

    Raises:
        ValueError: If another key has no counterpart (all such keys are listed), or the positions
            of images are not those of a square.
    """
    names = beit3_names(config)
    weights = without_prefix(state_dict, re.compile(re.escape(_PREFIX)), family="BEiT-3")
    weights = {
        key: tensor
        for key, tensor in weights.items()
        if key in names or not _is_superfluous(key, config)
    }
    if _IMAGE_POSITIONS in weights:
        weights[_IMAGE_POSITIONS] = _resize_image_positions(
            weights[_IMAGE_POSITIONS], config.img_size // config.patch_size
        )
    if _TEXT_POSITIONS in weights:
        weights[_TEXT_POSITIONS] = _resize_text_positions(
            weights[_TEXT_POSITIONS], config.max_text_len
        )
    return rename(weights, names, family="BEiT-3")


def _to_published(model: BEiT3) -> dict[str, Tensor]:
    """Renames our weights for unilm's models; the inverse of `_from_published`.

    Args:
        model: A model with options that the published code has as well; one of images alone gives
            its part of the names.

    Returns:
        Weights under unilm's names, the backbone under `beit3.`, sharing memory with the model.

    Raises:
        NotImplementedError: If the published code would compute something else with them.
    """
    _check_published_has(model.config)
    weights = published_names(model, beit3_names(model.config))
    return {
        key if key.startswith(_HEADS) else f"{_PREFIX}{key}": tensor
        for key, tensor in weights.items()
    }


CONVERTER = Converter(
    is_published=_is_published, from_published=_from_published, to_published=_to_published
)


def beit3_names(config: BEiT3Config) -> dict[str, str]:
    """Lists published key without prefix -> our key, for all keys of the model of a config."""
    modules = layer_names(
        config.num_layers,
        published="encoder.layers",
        ours="stack.blocks",
        has_inner_norms=config.norm == "sub_ln",
    )
    if config.final_norm and config.norm != "deepnorm":
        modules["encoder.layer_norm"] = "stack.norm"
    modules = {
        _published_expert(published, letter): _our_expert(ours, expert, config.num_modalities)
        for published, ours in modules.items()
        for expert, letter in enumerate("AB"[: config.num_modalities])
    }
    if "masked_image" in config.heads:
        modules["mim_head"] = "masked_image_head"
    if "masked_text" in config.heads:
        modules["mlm_head"] = "masked_text_head"
    if config.num_classes > 0:
        is_token = config.global_pool == "token"
        modules |= _TOKEN_CLASSIFIER_NAMES if is_token else _PATCH_CLASSIFIER_NAMES
    names = {**parameter_names(modules), **_IMAGE_NAMES}
    if config.vocab_size is not None:
        names |= _TEXT_NAMES
    if "retrieval" in config.heads:
        names |= _RETRIEVAL_NAMES
    return names


def _published_expert(module: str, letter: str) -> str:
    """`...ffn.fc1` -> `...ffn.A.fc1`: a whole feed-forward is one expert; `...q_proj.A` else."""
    return module.replace(".ffn.", f".ffn.{letter}.") if ".ffn." in module else f"{module}.{letter}"


def _our_expert(module: str, expert: int, num_modalities: int) -> str:
    if num_modalities == 1:
        return module
    if ".feed_forward." in module:
        return module.replace(".feed_forward.", f".feed_forward.experts.{expert}.")
    return f"{module}.experts.{expert}"


def _is_superfluous(key: str, config: BEiT3Config) -> bool:
    is_of_text = ".B." in key or key in _TEXT_NAMES
    return (
        key.startswith(_missing_heads(config))
        or (is_of_text and config.vocab_size is None)
        or (key.startswith("encoder.layer_norm.") and not config.final_norm)
    )


def _missing_heads(config: BEiT3Config) -> tuple[str, ...]:
    """How the names of the heads begin that the model does not have."""
    missing = [x for head, x in _PRETRAINING_HEADS.items() if head not in config.heads]
    missing += [_CLASSIFIER] * (config.num_classes == 0)
    return tuple(prefix for prefixes in missing for prefix in prefixes)


def _resize_image_positions(table: Tensor, grid_size: int) -> Tensor:
    """Interpolates (3 + patches, embed_dim) to a grid of another size, as unilm does."""
    old_size = math.isqrt(max(len(table) - _IMAGE_EXTRA_ROWS, 0))
    if old_size == 0 or old_size**2 != len(table) - _IMAGE_EXTRA_ROWS:
        raise ValueError(
            f"{_IMAGE_POSITIONS} must have {_IMAGE_EXTRA_ROWS} rows and one for each patch of a "
            f"square, got {len(table)} rows."
        )
    if old_size == grid_size:
        return table
    grid = table[_IMAGE_EXTRA_ROWS:].t().unflatten(1, (old_size, old_size))[None].float()
    grid = functional.interpolate(grid, size=(grid_size, grid_size), mode="bicubic")
    return torch.cat([table[:_IMAGE_EXTRA_ROWS], grid[0].flatten(1).t().to(table.dtype)])


def _resize_text_positions(table: Tensor, max_text_len: int) -> Tensor:
    """Cuts or repeats the positions of (2 + tokens, embed_dim)."""
    unused, positions = table[:_UNUSED_ROWS], table[_UNUSED_ROWS:]
    if len(positions) == max_text_len:
        return table
    repeats = math.ceil(max_text_len / max(len(positions), 1))
    return torch.cat([unused, positions.repeat(repeats, 1)[:max_text_len]])


def dense_segments(config: BEiT3Config) -> tuple[object, ...]:
    """What `segment_lengths` may be for `refuse_unpublished`: one segment for all tokens."""
    longest = 1 + config.num_patches + config.max_text_len
    is_dense = config.dilation_rates == (1,) and config.segment_lengths[0] >= longest
    return (config.segment_lengths,) if is_dense else ("one, for all tokens",)


def _check_published_has(config: BEiT3Config) -> None:
    """Refuses options with which the published code would compute something else."""
    wanted = {"norm": ("sub_ln",), "segment_lengths": dense_segments(config)}
    refuse_unpublished(config, wanted, code="the published BEiT-3")
