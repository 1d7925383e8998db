"""Registers the vision models with timm: `timm.create_model("longvit_small_patch32_1024")`.

timm's own builder makes them, so its options work as for its models: `num_classes`, `in_chans`,
`img_size`, `drop_rate`, `features_only`, `out_indices`, `pretrained_cfg_overlay`, and any field of
our config besides. Importing this module registers; `import longnet_zoo` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from longnet_zoo.factory import create_model
from longnet_zoo.models import LongViT
from longnet_zoo.models.longvit_config import data_config
from longnet_zoo.registry import ModelEntry, PublishedWeights, registered_models
from longnet_zoo.weights import options_of_names
from longnet_zoo.weights.checkpoint import unwrap
from longnet_zoo.weights.longvit import CONVERTER, fit_to_images

__all__: list[str] = []  # timm adds the names of the models

# timm's name -> ours. Others have one name in both.
_OPTION_NAMES = {
    "drop_rate": "head_dropout",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
    "drop_path_rate": "drop_path",
}
_HEAD = ("fc_norm.", "head.")


def _create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    if options.get("features_only"):
        options["num_classes"] = 0  # A head would be made, missed in the weights, and pruned.
    given = frozenset(_OPTION_NAMES.get(option, option) for option in options)
    return build_model_with_cfg(
        partial(_build, name),
        name,
        pretrained,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        pretrained_filter_fn=partial(_adapt_weights, given=given),
        **options,
    )


def _build(name: str, **options: Any) -> nn.Module:
    ours = {_OPTION_NAMES.get(option, option): value for option, value in options.items()}
    return create_model(name, **ours)


def _adapt_weights(
    content: dict[str, Any], model: LongViT, *, given: frozenset[str]
) -> dict[str, Tensor]:
    """Fits what timm has read to a model, and sets the switches that the weights were trained with.

    timm itself adapts the first convolution and drops a head of another size afterwards. It takes
    the size from the config of the weights, which here says that they have no head.

    Args:
        content: State dict, or a checkpoint with one inside.
        model: The model to load into; it takes the published switches with published weights.
        given: Options that the user has set, which stay as they are.
    """
    source = "the state dict"
    state_dict = unwrap(content, source=source).state_dict
    config = _config_of_weights(model, state_dict)
    switches = options_of_names(CONVERTER, state_dict, model.config, given=given, source=source)
    if CONVERTER.is_published(state_dict):
        _set_switches(model, switches)
        state_dict = CONVERTER.from_published(state_dict, config)
    else:
        state_dict = fit_to_images(state_dict, config)
    _check_keys(model, state_dict)
    if "head.weight" in state_dict:
        # What timm compares: it gives a new head where the number of classes is another one.
        model.pretrained_cfg["num_classes"] = config.num_classes
    return state_dict


def _check_keys(model: LongViT, state_dict: Mapping[str, Tensor]) -> None:
    """Refuses missing and unknown keys, which timm only logs where a head is new or dropped."""
    wanted = model.state_dict().keys()
    has_head = any(key.startswith(_HEAD) for key in state_dict)
    lacking = [key for key in wanted - state_dict.keys() if has_head or not key.startswith(_HEAD)]
    unknown = [key for key in state_dict.keys() - wanted if not key.startswith(_HEAD)]
    for what, keys in (("lack {} keys of", lacking), ("have {} keys that are not in", unknown)):
        if keys:
            raise ValueError(
                f"weights {what.format(len(keys))} this model: {', '.join(sorted(keys))}. "
                "Create it with the options they were trained with."
            )


def _config_of_weights(model: LongViT, state_dict: Mapping[str, Tensor]) -> Any:
    """The config with the channels and classes of the weights: timm fits those, and only once."""
    config = model.config
    for key, tensor in state_dict.items():
        if key.endswith("patch_embed.proj.weight"):
            config = replace(config, in_chans=tensor.shape[1])
        elif key == "head.weight":
            config = replace(config, num_classes=tensor.shape[0])
    return config


def _set_switches(model: LongViT, switches: Mapping[str, Any]) -> None:
    model.config = replace(model.config, **switches)
    for module in model.modules():
        if hasattr(module, "pattern"):  # the attention layers
            module.pattern = model.config.pattern  # type: ignore[assignment]
    # timm saves these with the weights, and makes the model with them again.
    model._model_args = dict(switches)  # type: ignore[assignment]


def _pretrained_cfg(entry: ModelEntry, weights: PublishedWeights | None) -> dict[str, Any]:
    cfg = data_config(entry.config)
    if weights is None:
        return cfg
    return {
        **cfg,
        "url": weights.location,
        "license": weights.licence.lower(),
        "description": entry.description,
        "notes": (weights.note,),
    }


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """Makes the function that timm calls; it goes by its name and its module."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    return create


_ENTRIES = registered_models(modality="vision")
# Found here by timm's `register_model`.
default_cfgs = generate_default_cfgs(
    {
        f"{entry.name}.{weights.tag}" if weights else entry.name: _pretrained_cfg(entry, weights)
        for entry in _ENTRIES
        for weights in entry.weights or (None,)
    }
)
for _entry in _ENTRIES:
    globals()[_entry.name] = register_model(_entry_point(_entry.name))
