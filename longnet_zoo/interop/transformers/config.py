"""The config of our text models as Transformers wants it: our options, and its names for them."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from longnet_zoo.models import LongNetLMConfig, LongNetMLMConfig
from longnet_zoo.models.text_config import (
    PAPER_DILATION_RATES,
    PAPER_SEGMENT_LENGTHS,
    TextConfig,
)
from longnet_zoo.ops.branches import make_branches

__all__ = ["LongNetConfig"]

# Heads are classes of their own in Transformers, not an option.
_NO_OPTION = ("num_outputs",)


class LongNetConfig(PreTrainedConfig):
    """Options of `LongNetModel` and its heads; the defaults are the LongNet paper's 125M model.

    The fields that are not listed are those of `longnet_zoo`'s `LongNetLMConfig` and
    `LongNetMLMConfig`, under the same names. Transformers' names (`hidden_size`,
    `num_hidden_layers`, `num_attention_heads`, ...) are understood, too. As in every config of
    Transformers, an option that is none of these is kept and has no effect.

    Attributes:
        is_causal: Whether a token sees no later one: True for `LongNetForCausalLM`, False for
            `LongNetForMaskedLM`.
        position: "xpos", "rotary", "alibi", "relative" or None; "auto" becomes "xpos" if causal
            and "rotary" otherwise, the defaults of our models.
        tie_word_embeddings: Whether the output head is the token embedding, transposed.
        use_cache: Whether `generate` uses a cache if not told.
        pad_token_id: Id that fills up; None where there is none.
        bos_token_id: Id that begins a document.
        eos_token_id: Id or ids that end a document.

    Raises:
        ValueError: If an option is outside its range.
        TypeError: If an option is of the wrong kind.

    Example:
        >>> config = LongNetConfig(vocab_size=259, embed_dim=128, num_layers=4, num_heads=4)
        >>> model = LongNetForCausalLM(config)
    """

    model_type = "longnet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation",
        "layer_norm_eps": "eps",
        "tie_embeddings": "tie_word_embeddings",
    }

    vocab_size: int = 100_256
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    segment_lengths: tuple[int, ...] = PAPER_SEGMENT_LENGTHS
    dilation_rates: tuple[int, ...] = PAPER_DILATION_RATES
    head_offset: str = "modulo"
    padded_keys: str = "ignore"
    is_causal: bool = True
    position: str | None = "auto"
    rotary_base: float = 10000.0
    xpos_scale_base: float = 512.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm: str = "sub_ln"
    activation: str = "gelu"
    qk_norm: bool = False
    bias: bool = True
    scale_embedding: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    eps: float = 1e-5
    backend: str = "auto"
    extra_branches: tuple[Any, ...] = ()
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)
        if type(self.is_causal) is not bool:
            raise TypeError(f"is_causal must be True or False, got {self.is_causal!r}.")
        if self.vocab_size is None:
            raise TypeError(
                "vocab_size must be an integer, got None: models of Transformers have a token "
                "embedding. Use longnet_zoo.create_model for one without."
            )
        if self.position == "auto":
            self.position = "xpos" if self.is_causal else "rotary"
        # JSON has neither tuples nor branches.
        self.extra_branches = tuple(map(asdict, make_branches(self.extra_branches)))
        self.segment_lengths = _as_tuple(self.segment_lengths)
        self.dilation_rates = _as_tuple(self.dilation_rates)
        self.to_zoo()  # Raises for values that our models refuse.

    @classmethod
    def from_zoo(cls, config: TextConfig, **options: Any) -> LongNetConfig:
        """Makes the config of a model of ours.

        Args:
            config: A `LongNetLMConfig` or `LongNetMLMConfig`.
            **options: Other options, such as `eos_token_id`.

        Raises:
            TypeError: If it is the config of another family.
        """
        if not isinstance(config, (LongNetLMConfig, LongNetMLMConfig)):
            raise TypeError(
                "config must be a LongNetLMConfig or LongNetMLMConfig, got "
                f"{type(config).__name__}."
            )
        shared = {name: getattr(config, name) for name in _option_names(type(config))}
        return cls(**{"is_causal": config.is_causal, **shared, **options})

    def to_zoo(self, *, num_outputs: int | None = None) -> LongNetLMConfig | LongNetMLMConfig:
        """Makes the config of the same model of ours.

        Args:
            num_outputs: Logits per token; None: `vocab_size`, 0: no head.
        """
        config_class = LongNetLMConfig if self.is_causal else LongNetMLMConfig
        shared = {name: getattr(self, name) for name in _option_names(config_class)}
        return config_class(**shared, num_outputs=num_outputs)


def _option_names(config_class: type[TextConfig]) -> list[str]:
    return [field.name for field in fields(config_class) if field.name not in _NO_OPTION]


def _as_tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values
