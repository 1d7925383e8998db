"""Key tables: published names to ours, and back by the inverse of the same table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from re import Pattern
from typing import Any

from torch import Tensor

from longnet_zoo.models import ModelConfig, ZooModel

__all__ = [
    "TORCHSCALE_LAYER_NAMES",
    "Converter",
    "as_arguments",
    "layer_names",
    "parameter_names",
    "published_names",
    "refuse_unpublished",
    "rename",
    "without_prefix",
]

# Published name -> ours, for the modules of one layer of torchscale.
TORCHSCALE_LAYER_NAMES = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.out_proj",
    "self_attn.inner_attn_ln": "attention.inner_norm",
    "self_attn_layer_norm": "attention_norm",
    "ffn.fc1": "feed_forward.fc1",
    "ffn.fc2": "feed_forward.fc2",
    "ffn.ffn_layernorm": "feed_forward.inner_norm",
    "final_layer_norm": "ffn_norm",
}

# Options of all published models; `refuse_unpublished` adds the number of key heads.
_EVERYWHERE: Mapping[str, tuple[object, ...]] = {
    "activation": ("gelu",),
    "qk_norm": (False,),
    "bias": (True,),
}


@dataclass(frozen=True, kw_only=True)
class Converter:
    """How the weights of one family were published.

    Attributes:
        is_published: Whether a state dict has the published names rather than ours.
        from_published: Published state dict and our config to our state dict; raises ValueError
            with all keys that have no counterpart.
        to_published: The way back, for a model; raises NotImplementedError for options that the
            published code does not have.
        options: Options that published weights were trained with, where a new model has others.
    """

    is_published: Callable[[Mapping[str, Tensor]], bool]
    from_published: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    to_published: Callable[[Any], dict[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)


def layer_names(
    num_layers: int, *, published: str, ours: str, has_inner_norms: bool = True
) -> dict[str, str]:
    """Lists the modules of all layers: published name -> ours.

    Args:
        num_layers: Number of layers.
        published: What stands before the number of a layer, such as `"encoder.layers"`.
        ours: The same in our models, such as `"stack.blocks"`.
        has_inner_norms: Whether attention and feed-forward have a norm inside, as with sub-LN.
    """
    return {
        f"{published}.{layer}.{theirs}": f"{ours}.{layer}.{name}"
        for layer in range(num_layers)
        for theirs, name in TORCHSCALE_LAYER_NAMES.items()
        if has_inner_norms or not name.endswith("inner_norm")
    }


def parameter_names(modules: Mapping[str, str]) -> dict[str, str]:
    """Adds `.weight` and `.bias` to the names of modules that have both."""
    return {
        f"{published}.{parameter}": f"{ours}.{parameter}"
        for published, ours in modules.items()
        for parameter in ("weight", "bias")
    }


def rename(
    state_dict: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    family: str,
    cure: str = "Create the model with the options they were trained with.",
) -> dict[str, Tensor]:
    """Renames every key of a state dict by a table.

    Args:
        state_dict: Tensors by name.
        names: Old name -> new name.
        family: What to call the weights in an error.
        cure: What to do about keys that are not in the table.

    Raises:
        ValueError: If keys are not in the table; the message has all of them.
    """
    unknown = sorted(state_dict.keys() - names.keys())
    if unknown:
        raise ValueError(
            f"{family} weights have {len(unknown)} keys without a counterpart in this model: "
            f"{', '.join(unknown)}. {cure}"
        )
    return {names[key]: tensor for key, tensor in state_dict.items()}


def without_prefix(
    state_dict: Mapping[str, Tensor], prefix: Pattern[str], *, family: str
) -> dict[str, Tensor]:
    """Cuts what a pattern matches at its start off every key that has it.

    Args:
        state_dict: Tensors by name.
        prefix: What to cut off.
        family: What to call the weights in an error.

    Raises:
        ValueError: If two keys become one: such a file holds the weights of two models.
    """
    originals: dict[str, str] = {}
    for key in state_dict:
        match = prefix.match(key)
        plain = key[match.end() :] if match else key
        if plain in originals:
            raise ValueError(
                f"{family} weights must be those of one model, got both {originals[plain]!r} and "
                f"{key!r}. Pass the state dict of one of the two."
            )
        originals[plain] = key
    return {plain: state_dict[key] for plain, key in originals.items()}


def published_names(model: ZooModel, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Renames the weights of a model back, by the inverse of the table; memory is shared."""
    inverse = {ours: published for published, ours in names.items()}
    return {inverse[key]: tensor for key, tensor in model.state_dict().items()}


def refuse_unpublished(
    config: ModelConfig, wanted: Mapping[str, tuple[object, ...]], *, code: str
) -> None:
    """Refuses options with which the published code would compute something else.

    Every published model has the options of `_EVERYWHERE` as well.

    Args:
        config: The config of a model that is to be renamed.
        wanted: Values of its fields that the published code has; the last one is what it computes
            in place of others.
        code: What to call that code in an error.

    Raises:
        NotImplementedError: If a field has another value.
    """
    everywhere = {**_EVERYWHERE, "num_kv_heads": (None, config.num_heads)}
    for name, allowed in {**everywhere, **wanted}.items():
        value = getattr(config, name)
        if value not in allowed:
            raise NotImplementedError(
                f"{code} has no counterpart of {name}={value!r}; it computes "
                f"{name}={allowed[-1]!r}. It would give other outputs with these weights."
            )


def as_arguments(options: Mapping[str, Any]) -> str:
    """Shows options as a call would pass them: "embed_dim=128, num_layers=6"."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
