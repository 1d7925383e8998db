"""The options of models, checked: what all configs can do, and those of a Transformer stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from longnet_zoo.layers import Activation, Norm
from longnet_zoo.ops.kernels import BACKENDS
from longnet_zoo.ops.pattern import DilatedPattern, HeadOffset, PaddedKeys

from .checks import (
    check_choices,
    check_flags,
    check_heads,
    check_integers,
    check_positive,
    check_probabilities,
)

__all__ = ["ModelConfig", "ZooConfig"]

ConfigT = TypeVar("ConfigT", bound="ZooConfig")


@dataclass(frozen=True, kw_only=True)
class ZooConfig:
    """Base of all configs. A field is a plain value, or the config of a part of the model."""

    @property
    def pattern(self) -> DilatedPattern:
        """The attention pattern; that of the main part where there are several."""
        raise NotImplementedError(f"{type(self).__name__} must define pattern.")

    @property
    def usual_seq_len(self) -> int:
        """A typical number of tokens, what `model_info` counts FLOPs for."""
        return self.pattern.segment_lengths[-1]

    def changed(self: ConfigT, options: Mapping[str, Any]) -> ConfigT:
        """Makes a config with other options.

        Args:
            options: Values by name of the field. For a part of the model a mapping changes only
                the options that it names.

        Raises:
            TypeError: If there is no such field.
        """
        known = [field.name for field in fields(self)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no options {', '.join(map(repr, unknown))}. Options: "
                f"{', '.join(known)}."
            )
        parts = {
            name: getattr(self, name).changed(value)
            for name, value in options.items()
            if isinstance(value, Mapping) and isinstance(getattr(self, name, None), ZooConfig)
        }
        return replace(self, **{**options, **parts})

    def options(self) -> dict[str, Any]:
        """Lists all options by name; those of a part of the model as `"part.name"`."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, ZooConfig):
                inner = value.options().items()
                found |= {f"{field.name}.{name}": option for name, option in inner}
            else:
                found[field.name] = value
        return found

    @classmethod
    def from_json(cls: type[ConfigT], content: Mapping[str, Any]) -> ConfigT:
        """Makes a config from what JSON keeps of it, which has no tuples.

        Args:
            content: Values by name of the field.

        Raises:
            ValueError: If a field is unknown.
        """
        hints, known = get_type_hints(cls), {field.name for field in fields(cls)}
        unknown = sorted(content.keys() - known)
        if unknown:
            raise ValueError(f"{cls.__name__} has no fields {unknown}, it has {sorted(known)}.")
        return cls(**{name: _from_json(hints[name], value) for name, value in content.items()})


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ZooConfig):
    """Options of a Transformer stack.

    Attributes:
        embed_dim: Channels of the residual stream.
        num_layers: Number of blocks.
        num_heads: Number of query heads, a divisor of `embed_dim`.
        num_kv_heads: Number of key and value heads, a divisor of `num_heads`; None: `num_heads`.
        ffn_dim: Hidden channels of the feed-forward network; None: 4 * `embed_dim`.
        segment_lengths: Tokens per segment of each branch, strictly increasing.
        dilation_rates: Dilation rate of each branch.
        head_offset: Where the steps of each head start; see `DilatedPattern`.
        padded_keys: What fills an incomplete segment; see `DilatedPattern`.
        norm: "sub_ln" (Magneto), "pre_ln" or "deepnorm".
        activation: "gelu" or "swiglu".
        qk_norm: Whether queries and keys pass a LayerNorm.
        bias: Whether the linear layers of the blocks have a bias; heads are not concerned.
        dropout: Dropout of the embeddings and of what attention and feed-forward return.
        attention_dropout: Dropout of the attention weights.
        activation_dropout: Dropout of the feed-forward's hidden activation.
        drop_path: Drop-path rate of the last block; it grows linearly from 0.
        eps: Epsilon of the LayerNorms.
        backend: Attention kernel; "auto" takes the fastest that serves.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    segment_lengths: tuple[int, ...] | None
    dilation_rates: tuple[int, ...]
    head_offset: HeadOffset = "modulo"
    padded_keys: PaddedKeys = "ignore"
    norm: Norm = "sub_ln"
    activation: Activation = "gelu"
    qk_norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    eps: float = 1e-5
    backend: str = "auto"

    is_causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self, "embed_dim", "num_layers", "num_heads")
        check_integers(self, "num_kv_heads", "ffn_dim", optional=True)
        check_positive(self, "eps")
        check_probabilities(self, "dropout", "attention_dropout", "activation_dropout", "drop_path")
        check_flags(self, "qk_norm", "bias")
        check_choices(self, "norm", "activation")
        check_heads(self)
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}.")
        pattern = self.pattern  # Raises for lengths and rates that make no pattern.
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)
        if self.segment_lengths is not None:
            object.__setattr__(self, "segment_lengths", pattern.segment_lengths)

    @property
    def pattern(self) -> DilatedPattern:
        """The attention pattern."""
        if self.segment_lengths is None:
            raise TypeError("segment_lengths must be a tuple of integers, got None.")
        return self._pattern(self.segment_lengths)

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.embed_dim // self.num_heads

    def _pattern(self, segment_lengths: tuple[int, ...]) -> DilatedPattern:
        return DilatedPattern(
            segment_lengths=segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offset=self.head_offset,
            padded_keys=self.padded_keys,
        )


def _from_json(hint: Any, value: Any) -> Any:
    """Makes the value of a field with this annotation."""
    if isinstance(value, Mapping):
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and issubclass(kind, ZooConfig):
                return kind.from_json(value)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
