"""Dilated attention in models of Hugging Face Transformers, as an attention implementation.

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="longnet_dilated")
    model = set_pattern(model, DilatedPattern.geometric(2048, 32768))

Every model that uses the attention interface of Transformers can take it: Llama, Qwen, Mistral,
GPT-NeoX and many more, and bidirectional encoders. The pattern is a part of the model's config, so
it is saved and loaded with the model. A model without one has the pattern of the paper. A pattern
is not dense attention for short sequences either: where several branches reach a key, it counts
several times. One segment that covers the sequence, with rate 1, is the model as it was.

Segments start at the first token of each sequence: left padding, right padding and packing do not
change what a token gets. What dilated attention cannot serve is refused, never dropped; so is a
sliding window (Mistral's first version, Qwen on demand) that is shorter than the sequence, for a
pattern takes its place: set `config.sliding_window = None` to say so. Decoding with a cache of
Transformers is exact; the cache keeps all keys, and a step reads those of the current segments.

Shape legend: b batch, n keys, m queries (the last of n positions), h heads, d head_dim.
"""

from __future__ import annotations

import json
from functools import lru_cache, partial
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from longnet_zoo.models.text_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.prefix_attention import attend_last_rows

from .attention_mask import boundaries, refuse_window, tokens_or_boundaries

__all__ = ["ATTENTION_NAME", "set_pattern"]

ATTENTION_NAME = "longnet_dilated"

_CONFIG_KEY = "longnet_pattern"
_PATTERN_FIELDS = ("segment_lengths", "dilation_rates", "head_offset", "padded_keys")
_PAPER_PATTERN = DilatedPattern(
    segment_lengths=PAPER_SEGMENT_LENGTHS, dilation_rates=PAPER_DILATION_RATES
)
# What models hand to attention that changes its result and has no meaning here.
_REFUSED_OPTIONS = (
    "alibi",
    "attention_bias",
    "block_indices",
    "cache",
    "head_mask",
    "indices",
    "output_attentions",
    "position_bias",
    "s_aux",
    "sinks",
    "softcap",
)
# Rows up to which a step of decoding looks at all their keys at once.
_FEW_ROWS = 8

Model = TypeVar("Model", bound=nn.Module)
# `dilated_attention` with its options but those that depend on the batch.
Attend: TypeAlias = "partial[Tensor]"


def set_pattern(model: Model, pattern: DilatedPattern) -> Model:
    """Gives a model its pattern, as a part of its config that is saved and loaded with it.

    Args:
        model: A model of Transformers with `attn_implementation="longnet_dilated"`, wrapped by PEFT
            or not. Of a model for several modalities the text model gets the pattern.
        pattern: Which keys a query sees, in all layers.

    Returns:
        The model.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the model has another attention or is a LongNet, or the pattern is of a part
            of the heads.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(
        ...     folder, attn_implementation="longnet_dilated"
        ... )
        >>> model = set_pattern(model, DilatedPattern.geometric(2048, 32768))
    """
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}.")
    if pattern.first_head or pattern.total_heads is not None:
        raise ValueError(
            "pattern must be that of all heads, got "
            f"first_head={pattern.first_head} and total_heads={pattern.total_heads}."
        )
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"model must be a model of Hugging Face Transformers, got {type(model).__name__}."
        )
    config = config.get_text_config()
    if config.model_type == "longnet":
        raise ValueError(
            "a LongNet has a pattern of its own, got another for a model with segment_lengths="
            f"{config.segment_lengths}. Make it with other segment_lengths and dilation_rates."
        )
    if config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"set_pattern needs a model whose attention is {ATTENTION_NAME!r}, got "
            f"{config._attn_implementation!r}. Call model.set_attn_implementation"
            f"({ATTENTION_NAME!r}) first, or load the model with it."
        )
    # Lists, as JSON would make of it.
    fields = {name: getattr(pattern, name) for name in _PATTERN_FIELDS}
    setattr(config, _CONFIG_KEY, json.loads(json.dumps(fields)))
    return model


def attend_dilated(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attends by the pattern in the module's config; an attention interface of Transformers.

    Args:
        module: The attention layer.
        query: Queries, (b, h, m, d): those of the last m positions.
        key: Keys, (b, num_kv_heads, n, d), or more with a static cache.
        value: Values, like `key`; d may be smaller.
        attention_mask: None, or what `tokens_or_boundaries` returns.
        dropout: Probability of dropping an attention weight.
        scaling: Factor on the dot products.
        is_causal: Whether a query sees only the keys up to itself; None: as the module says.
        sliding_window: Refused where it is shorter than the sequence.
        options: What else the model hands on: boundaries of packed sequences and positions, which
            are used, and what has no effect on attention.

    Returns:
        The output, (b, m, h, d), and None for the weights.

    Raises:
        NotImplementedError: If an option or a mask has no meaning for dilated attention.
        ValueError: If a sliding window has an effect, or boundaries do not fit.
    """
    _check_options(module, attention_mask, options)
    # Some models say 0 for none.
    if sliding_window and key.shape[2] > sliding_window:
        refuse_window(sliding_window, key.shape[2])
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    attend = partial(
        dilated_attention,
        pattern=_pattern(getattr(module, "config", None)),
        is_causal=bool(is_causal),
        scale=scaling,
        dropout_p=dropout,
    )
    value_dim = value.shape[3]
    if value_dim < query.shape[3]:
        # The op wants one head_dim for all; channels of zeros stay zeros.
        value = F.pad(value, (0, query.shape[3] - value_dim))
    q, k, v = (_autocast(x.transpose(1, 2)) for x in (query, key, value))
    cu_seqlens = _packed_boundaries(q, k, attention_mask, options)
    if cu_seqlens is not None:
        out = _attend_packed(attend, q, k, v, attention_mask, cu_seqlens)
    else:
        if attention_mask is not None:
            # Behind the mask are free places of a static cache.
            k, v = k[:, : attention_mask.shape[1]], v[:, : attention_mask.shape[1]]
        run = _attend_rows if q.shape[1] == k.shape[1] else _attend_after_cache
        out = run(attend, q, k, v, attention_mask)
    return out[..., :value_dim].contiguous(), None


def _check_options(
    module: nn.Module, attention_mask: Tensor | None, options: dict[str, Any]
) -> None:
    # Not by `in (None, False)`: some of them are tensors.
    values = {name: options.get(name) for name in _REFUSED_OPTIONS}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if given:
        raise NotImplementedError(
            f"dilated attention takes no {', '.join(given)}, got it from {type(module).__name__}. "
            "Use attn_implementation='eager'."
        )
    config = getattr(module, "config", None)
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise NotImplementedError(
                "dilated attention is of a sequence to itself, got a model with cross attention: "
                f"{type(config).__name__}.{name}=True. Use attn_implementation='sdpa'."
            )
    if attention_mask is not None and (attention_mask.ndim, attention_mask.dtype) not in (
        (1, torch.int32),
        (2, torch.bool),
    ):
        raise NotImplementedError(
            "dilated attention takes no mask of pairs, got an attention_mask of shape "
            f"{tuple(attention_mask.shape)} and {attention_mask.dtype}. Give the model one of "
            "shape (batch, seq_len), 1 at tokens and 0 at padding."
        )


def _pattern(config: PreTrainedConfig | None) -> DilatedPattern:
    fields = getattr(config, _CONFIG_KEY, None)
    return _PAPER_PATTERN if fields is None else _read_pattern(json.dumps(fields))


@lru_cache
def _read_pattern(text: str) -> DilatedPattern:
    return DilatedPattern(**json.loads(text))


def _autocast(x: Tensor) -> Tensor:
    """Casts as autocast would: positions that are turned in float32 leave q and k so."""
    kind = x.device.type
    is_cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if is_cast else x


def _packed_boundaries(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    """Boundaries of packed sequences: given as such, by the mask, or by positions that restart."""
    given = options.get("cu_seq_lens_q")
    if given is not None:
        of_keys = options.get("cu_seq_lens_k")
        if q.shape[1] != k.shape[1] or not (of_keys is None or torch.equal(given, of_keys)):
            raise ValueError(
                "packed sequences must have the same boundaries for queries and keys, got "
                f"cu_seq_lens_q={given.tolist()}, cu_seq_lens_k="
                f"{None if of_keys is None else of_keys.tolist()} for {q.shape[1]} queries and "
                f"{k.shape[1]} keys."
            )
        return given.to(torch.int32)
    if attention_mask is not None:
        return attention_mask if attention_mask.ndim == 1 else None
    position_ids = options.get("position_ids")
    # With a cache the mask does not tell of packing, and a model hands on its positions.
    if position_ids is None or position_ids.ndim != 2 or q.shape[1] != k.shape[1]:
        return None
    starts = (position_ids == 0).expand(q.shape[:2])
    return boundaries(starts) if starts[:, 1:].any() else None


def _attend_packed(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, cu_seqlens: Tensor
) -> Tensor:
    if tokens is not None and tokens.ndim == 2:
        raise ValueError(
            "packed sequences have no padding, got boundaries and an attention_mask with "
            f"{int((~tokens).sum())} places of padding. Give one of the two."
        )
    # (b, n, h, d) -> (1, b * n, h, d), since boundaries count over all rows.
    packed = (x.flatten(0, 1)[None] for x in (q, k, v))
    return attend(*packed, cu_seqlens=cu_seqlens)[0].unflatten(0, q.shape[:2])


def _attend_rows(attend: Attend, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> Tensor:
    """Attends with all queries there are, (b, n, h, d)."""
    if tokens is None:
        return attend(q, k, v)
    first = _first_tokens(tokens)
    if not first.any():
        return attend(q, k, v, key_padding_mask=~tokens)
    # Left padding goes behind the tokens, for segments to start at the first token, and back.
    batch = torch.arange(len(q), device=q.device)[:, None]
    places = torch.arange(q.shape[1], device=q.device)
    there, back = ((places + shift) % q.shape[1] for shift in (first[:, None], -first[:, None]))
    q, k, v, tokens = (x[batch, there] for x in (q, k, v, tokens))
    return attend(q, k, v, key_padding_mask=~tokens)[batch, back]


def _attend_after_cache(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None
) -> Tensor:
    """Attends with the last queries, (b, m, h, d), to all keys, (b, n, h, d)."""
    options = attend.keywords
    if not options["is_causal"]:
        raise NotImplementedError(
            "bidirectional dilated attention needs all queries at once, got "
            f"{q.shape[1]} queries and {k.shape[1]} keys. Run the model with use_cache=False."
        )
    num_before = k.shape[1] - q.shape[1]
    first = [0] * len(q) if tokens is None else _first_tokens(tokens).tolist()
    has_holes = tokens is not None and k.shape[1] * len(q) - sum(first) != int(tokens.sum())
    if q.shape[1] > _FEW_ROWS or options["dropout_p"] or has_holes or max(first) > num_before:
        # Rows before these are computed, too, and left out.
        q = F.pad(q, (0, 0, 0, 0, num_before, 0))
        return _attend_rows(attend, q, k, v, tokens)[:, num_before:]
    if len(set(first)) == 1:
        return _last_rows(q, k[:, first[0] :], v[:, first[0] :], options)
    rows = zip(q.split(1), k.split(1), v.split(1), first, strict=True)
    return torch.cat([_last_rows(q, k[:, i:], v[:, i:], options) for q, k, v, i in rows])


def _last_rows(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    pattern: DilatedPattern = options["pattern"]
    # Nothing before the last border that all segments share is seen.
    num_before = k.shape[1] - q.shape[1]
    border = num_before - num_before % pattern.segment_lengths[-1] if pattern.is_nested else 0
    return attend_last_rows(q, k[:, border:], v[:, border:], pattern, scale=options["scale"])


def _first_tokens(tokens: Tensor) -> Tensor:
    """Counts the padding before the first token of each row: (b,)."""
    return (tokens.cumsum(1) == 0).sum(1)


AttentionInterface.register(ATTENTION_NAME, attend_dilated)
AttentionMaskInterface.register(ATTENTION_NAME, tokens_or_boundaries)
