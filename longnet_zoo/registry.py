"""The catalogue: names to builders. A leaf, it imports nothing of this package.

A model file registers each of its sizes when it is imported; `longnet_zoo.factory` looks them up.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "SHIPPED_PREFIX",
    "ModelEntry",
    "PublishedWeights",
    "find_model",
    "nearest_names",
    "register_model",
    "registered_models",
]

# Begins the location of weights that come with this package.
SHIPPED_PREFIX = "shipped:"

BuilderT = TypeVar("BuilderT", bound="Callable[[Any], nn.Module]")


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """Trained weights of a registered model.

    Attributes:
        tag: Their name among the weights of the model: `create_model(name, pretrained=tag)`.
        location: Where they are: `"hf_hub:owner/name/file"`, the address of a file, or
            `"shipped:name"` for those that come with this package.
        licence: The licence they are published under.
        sha256: Digest of the file in hex; None where the publisher states none.
        options: Options of the model that they were trained with, where they differ from its
            defaults.
        note: What a user must know to get them, such as "gated: ask for access on its page".
    """

    tag: str
    location: str
    licence: str
    sha256: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def is_shipped(self) -> bool:
        """Whether they come with this package, so that no network is needed."""
        return self.location.startswith(SHIPPED_PREFIX)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """What the catalogue knows of one name.

    Attributes:
        name: The name users type.
        build: Makes the model from a config.
        config: The default config, a frozen dataclass; its fields are the options of the model.
        family: Models of one family share a class and a config class.
        modality: What the model reads: "text", "vision", "audio", ...
        description: One line for people.
        source: The paper or code the sizes come from.
        weights: Trained weights, the default ones first; empty where there are none.
    """

    name: str
    build: Callable[[Any], nn.Module]
    config: Any
    family: str
    modality: str
    description: str
    source: str
    weights: tuple[PublishedWeights, ...] = ()


_ENTRIES: dict[str, ModelEntry] = {}


def register_model(
    name: str,
    *,
    config: Any,
    family: str,
    modality: str,
    description: str,
    source: str,
    weights: tuple[PublishedWeights, ...] = (),
) -> Callable[[BuilderT], BuilderT]:
    """Registers the decorated builder (config -> model) under a name.

    Args:
        name: The name users type.
        config: The default config of this size, a frozen dataclass.
        family: Models of one family share a class and a config class.
        modality: What the model reads, for example "text".
        description: One line for people.
        source: The paper or code the sizes come from.
        weights: Trained weights, the default ones first.

    Returns:
        The decorator; it returns the builder unchanged.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(build: BuilderT) -> BuilderT:
        taken = _ENTRIES.get(name)
        if taken is not None:
            raise ValueError(
                f"model names must be unique, got {name!r} for {_qualified_name(build)}, but it is "
                f"registered for {_qualified_name(taken.build)}. Choose another name."
            )
        _ENTRIES[name] = ModelEntry(
            name=name,
            build=build,
            config=config,
            family=family,
            modality=modality,
            description=description,
            source=source,
            weights=weights,
        )
        return build

    return decorate


def registered_models(
    pattern: str = "*",
    *,
    modality: str | None = None,
    family: str | None = None,
    pretrained: bool | None = None,
) -> list[ModelEntry]:
    """Lists the entries that match every filter, sorted by name.

    Args:
        pattern: Shell-style pattern on the name, such as `"*slide*"`.
        modality: Keep only this modality.
        family: Keep only this family.
        pretrained: Keep only models with (True) or without (False) published weights.

    Returns:
        The matching entries; an empty list where nothing matches.

    Raises:
        ValueError: If no registered model has this modality or family.
    """
    _check_known("modality", modality, {entry.modality for entry in _ENTRIES.values()})
    _check_known("family", family, {entry.family for entry in _ENTRIES.values()})
    return [
        entry
        for name, entry in sorted(_ENTRIES.items())
        if fnmatch.fnmatchcase(name, pattern)
        and modality in (None, entry.modality)
        and family in (None, entry.family)
        and pretrained in (None, bool(entry.weights))
    ]


def find_model(name: str) -> ModelEntry:
    """Looks one name up.

    Args:
        name: A registered name.

    Returns:
        Its entry.

    Raises:
        TypeError: If the name is not a string.
        ValueError: If nothing is registered under this name; the message has the nearest names.
    """
    if not isinstance(name, str):
        raise TypeError(f"model names must be strings, got {name!r} ({type(name).__name__})")
    if name not in _ENTRIES:
        near = nearest_names(name, _ENTRIES)
        cure = f"Did you mean {near}?" if near else "list_models() has all names."
        raise ValueError(f"no model is registered under the name {name!r}. {cure}")
    return _ENTRIES[name]


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Joins the up to three known names nearest to a mistyped one: "'a', 'b' or 'c'", or ""."""
    near = [repr(match) for match in difflib.get_close_matches(name, sorted(known), n=3)]
    return " or ".join([", ".join(near[:-1]), near[-1]] if len(near) > 1 else near)


def _check_known(field: str, value: str | None, known: set[str]) -> None:
    if value is not None and value not in known:
        raise ValueError(
            f"{field} must be one of {', '.join(map(repr, sorted(known)))}, got {value!r}"
        )


def _qualified_name(build: Callable[[Any], nn.Module]) -> str:
    return f"{build.__module__}.{getattr(build, '__qualname__', repr(build))}"
