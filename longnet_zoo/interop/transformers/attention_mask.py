"""What dilated attention is told about padding and packing, instead of a mask of pairs (n, n).

Transformers describes who sees whom by a function of two positions. A pattern replaces the choice
of keys, so only two such functions can be served besides padding: all earlier keys, and all keys,
each within the sequence of the token. Every other one (a sliding window that has an effect, image
tokens that see ahead, a prefix) is refused, for nothing would be left of it.

Shape legend: b batch, n seq_len, m rows of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

__all__ = ["refuse_window", "tokens_or_boundaries"]

# Of (row of the batch, head, position of a query, position of a key): whether it may be seen.
PairFunction = Callable[..., Any]


def tokens_or_boundaries(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: PairFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Makes the `attention_mask` of `attend_dilated`; a mask interface of Transformers.

    Args:
        batch_size: Rows of the batch.
        q_length: Tokens that are read now.
        kv_length: Keys that the layers will hand over; with a static cache also free places.
        q_offset: Tokens in the cache.
        kv_offset: Tokens that a cache has dropped.
        mask_function: Who sees whom.
        attention_mask: True at tokens, (b, tokens in the cache and read now), or None.
        local_size: Tokens of the sliding window or chunk, if there is one.
        use_vmap: Whether `mask_function` holds a function of the user.
        config: Config of the model.
        device: Where the result is wanted.

    Returns:
        None where all keys are tokens of one sequence per row; else bool, (b, keys in use), True at
        tokens; or, if sequences are packed, int32 boundaries of the rows laid behind each other.

    Raises:
        NotImplementedError: If the model or `mask_function` cannot be served.
        ValueError: If a sliding window has an effect, or the mask has another length.
    """
    if config is not None:
        _check_model(type(config))
    in_use = int(q_offset) + q_length
    if local_size == 0:
        return None  # of a window that no layer has
    if local_size is not None and in_use > local_size:
        refuse_window(local_size, in_use)
    if int(kv_offset) or (mask_function is bidirectional_mask_function and kv_length != in_use):
        raise NotImplementedError(
            "dilated attention is of a sequence to itself, got "
            f"{q_length} queries after {int(q_offset)} tokens and {kv_length} keys. Give layers "
            "of cross attention another attn_implementation."
        )
    if use_vmap:
        raise NotImplementedError(
            "dilated attention takes no function of the model on top of its mask (for tokens that "
            f"see ahead, or a prefix), got one for {q_length} tokens. "
            "Use attn_implementation='sdpa'."
        )
    if attention_mask is not None and attention_mask.shape[1] != in_use:
        raise ValueError(
            "attention_mask must cover the tokens in the cache and those that are read, "
            f"{in_use}, got {tuple(attention_mask.shape)}."
        )
    starts = _sequence_starts(mask_function, batch_size, q_length, int(q_offset), device)
    if starts is not None:
        return boundaries(starts)
    if kv_length > in_use and attention_mask is None:
        return torch.ones(batch_size, in_use, dtype=torch.bool, device=device)
    if attention_mask is None or (kv_length == in_use and bool(attention_mask.all())):
        return None
    return attention_mask.bool()


def refuse_window(window: int, seq_len: int) -> None:
    """Raises: a pattern of segments and a sliding window are two choices of keys."""
    raise ValueError(
        "dilated attention takes the place of a sliding or chunked window, so a window must not be "
        f"shorter than the sequence, got a window of {window} and {seq_len} tokens. To let the "
        "pattern decide alone, set config.sliding_window = None (and layer_types, where the config "
        "has them, to 'full_attention') before the model is built."
    )


def boundaries(starts: Tensor) -> Tensor:
    """Boundaries of packed sequences, int32, from where they start, bool (b, n)."""
    # Each row of the batch starts one as well.
    starts = starts.clone()
    starts[:, 0] = True
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_tensor([starts.numel()])]).to(torch.int32)


def _check_model(config_class: type[PreTrainedConfig]) -> None:
    """Refuses models with an attention of their own: without a mask theirs would see the future."""
    found = MODEL_MAPPING.get(config_class, None)
    for model_class in found if isinstance(found, tuple) else (found,):
        if model_class is not None and not model_class._can_set_attn_implementation():
            raise NotImplementedError(
                "attn_implementation='longnet_dilated' needs a model that uses the attention "
                f"interface of Transformers, got {model_class.__name__}. Load it with "
                "attn_implementation='eager'."
            )


def _sequence_starts(
    sees: PairFunction, batch_size: int, num_rows: int, offset: int, device: torch.device | str
) -> Tensor | None:
    """Where packed sequences start, (b, n), if there are any; refuses other ways to see.

    Each token is asked for a few keys, at the ends of what it should see: no (n, n) is made.
    """
    if sees in (causal_mask_function, bidirectional_mask_function):
        return None
    stop = offset + num_rows
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(batch)
    rows = torch.arange(offset, stop, device=device)[None].expand(batch_size, -1)
    starts = ~sees(batch, head, rows, (rows - 1).clamp(min=0)) & (rows > 0)
    first = torch.where(starts, rows, 0).cummax(1).values
    sees_next = sees(batch, head, rows, (rows + 1).clamp(max=stop - 1))[:, :-1]
    is_served = (
        sees(batch, head, rows, rows).all()
        & sees(batch, head, rows, first).all()
        & ~(sees(batch, head, rows, torch.zeros_like(rows)) & (first > 0)).any()
        & (~sees_next.any() | (sees_next == ~starts[:, 1:]).all())
    )
    if not is_served or (offset and starts.any()):
        raise NotImplementedError(
            "dilated attention serves causal and bidirectional attention within sequences, got a "
            f"mask function, {getattr(sees, '__qualname__', sees)}, by which some of {stop} tokens "
            "see otherwise. Use attn_implementation='sdpa'."
        )
    return starts if starts.any() else None
