"""Loads the causal language model that is fine-tuned, and refuses what cannot be.

Shapes: n seq_len, v vocab_size.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from longnet_zoo import DilatedPattern

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

__all__ = ["Quantization", "has_linear_head", "load_base", "load_whole", "quietly"]

Quantization = Literal["none", "4bit"]

_PROBE_LENGTH = 8


def load_base(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    pattern: DilatedPattern | None = None,
    chunk_size: int | None = None,
    quantization: Quantization = "none",
) -> "PreTrainedModel":
    """Loads a causal language model of Transformers.

    Args:
        name: Folder that `save_pretrained` wrote, or name on the hub.
        options: Arguments of `from_pretrained`, such as dtype, revision or rope_parameters.
        pattern: Whom its attention sees; None leaves its attention as it is.
        chunk_size: Tokens that pass through a feed-forward network at once; None takes all.
        quantization: "4bit" keeps the linear layers, but the head, in 4 bits.

    Raises:
        ValueError: There is no such model, it lacks weights, or it sees what comes next.
        RuntimeError: bitsandbytes is needed and not installed.
    """
    from longnet_zoo.interop.transformers import ATTENTION_NAME, patch_blockwise, set_pattern

    keywords = dict(options or {})
    if pattern is not None:
        given = keywords.get("attn_implementation", ATTENTION_NAME)
        if given != ATTENTION_NAME:
            raise ValueError(
                f"a pattern needs attn_implementation={ATTENTION_NAME!r}, got {given!r} in "
                "model.model_options. Leave it out, or set model.pattern to null."
            )
        keywords["attn_implementation"] = ATTENTION_NAME
    if quantization == "4bit":
        keywords |= {"quantization_config": _four_bits(), "device_map": {"": _device()}}
    if "subfolder" in keywords:
        raise ValueError(
            "adapters remember the folder of their base alone, got model.model_options.subfolder="
            f"{keywords['subfolder']!r}. Pass that folder as model.model_name."
        )
    model = load_whole(name, **keywords)
    for module in model.modules():
        # On such CPUs bitsandbytes 0.50 turns weights, in an evaluation, into a form that has no
        # gradient, and leaves them so.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if pattern is not None:
        set_pattern(model, pattern)
    if chunk_size is not None:
        # The recipe computes the loss by itself, token by token.
        patch_blockwise(model, chunk_size=chunk_size, use_chunked_loss=False)
    _check_causal(model, name)
    return model


def load_whole(name: str | Path, **keywords: Any) -> "PreTrainedModel":
    """Loads a causal language model with all its weights, none of them drawn at random.

    Args:
        name: Folder that `save_pretrained` wrote, or name on the hub.
        **keywords: Arguments of `from_pretrained`.

    Raises:
        ValueError: There is no such model, an argument does not fit, or it lacks weights.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quietly():
            model, found = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, **keywords
            )
    # Each class of models and each package below has its own kinds of errors.
    except Exception as error:
        given = {key: value for key, value in keywords.items() if key != "config"}
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            "a base must be the folder of a causal language model of Transformers, or its name on "
            f"the hub, and model_options arguments of its from_pretrained, got {str(name)!r} and "
            f"{given}: {reason}"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"a base brings all its weights, and {str(name)!r} has none for "
            f"{', '.join(missing[:4])}{' and so on' if missing[4:] else ''} of "
            f"{type(model).__name__}. Pass a model that was saved with its language-model head, "
            "and for adapters the one that they were trained on."
        )
    return model


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silences bars for the files of a model, and warnings that its user can do nothing about."""
    from transformers.utils import logging

    has_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT uses the old one, and older versions of Transformers have no other.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            # PEFT mends it by itself, for GPT-2.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            yield
    finally:
        if has_bars:
            logging.enable_progress_bar()


def has_linear_head(model: "PreTrainedModel") -> bool:
    """Returns whether the logits are a linear layer of the features, with nothing behind it."""
    tokens, head = _probe(model), model.get_output_embeddings()
    # Adapters put another layer here, whose weight is not the whole truth.
    if type(head) is not torch.nn.Linear:
        return False
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        features = model.base_model(input_ids=tokens).last_hidden_state
        return torch.allclose(head(features), logits, rtol=1e-2, atol=1e-3)


def _check_causal(model: "PreTrainedModel", name: str) -> None:
    """Refuses encoders, of which some load as a causal model and see the token to predict."""
    tokens = _probe(model)
    changed = tokens.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        before, after = (model(input_ids=x).logits[:, :-1] for x in (tokens, changed))
    difference = float((after - before).abs().max())
    if difference > 1e-2 * float(before.abs().max()):
        raise ValueError(
            f"a causal model's logits must not depend on later tokens, and those of {name!r} "
            f"({type(model).__name__}) change by {difference:.3g}. Pass a decoder, or, if it can "
            "be one, model.model_options.is_decoder=true."
        )


def _probe(model: "PreTrainedModel") -> Tensor:
    return torch.arange(_PROBE_LENGTH, device=model.device)[None]


def _four_bits() -> "BitsAndBytesConfig":
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError(
            "quantization='4bit' needs the package bitsandbytes, which is not installed. Install "
            "it with `pip install bitsandbytes`, or set model.quantization to none."
        )
    from transformers import BitsAndBytesConfig

    # The settings of the QLoRA paper.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _device() -> str:
    """Returns where this process will train: weights become 4 bits where they are loaded to."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
