"""How a model of the zoo is asked, and what that costs.

Models of text read tokens and answer at the labelled positions: a causal one from all before, and
one that sees both sides from the whole sequence, in which answers that are written are hidden.
Models of images (LongViT) read the pixels of Pathfinder as an image.

Shape legend: b batch, n seq_len, a answers in the batch, v classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from longnet_zoo.models import LongViT, ModelConfig, TextModel

from .pathfinder import Pathfinder
from .task import IGNORE_INDEX, Task

__all__ = ["answer_logits", "check_model", "flops_per_example", "options_for"]


def options_for(task: Task, *, modality: str) -> dict[str, Any]:
    """Returns the options that make a new model of the zoo fit a task.

    Args:
        task: The task.
        modality: What the model reads, as in the registry.

    Raises:
        ValueError: Models of this modality cannot do the task.
    """
    if modality == "text":
        return {"vocab_size": task.vocab_size}
    if modality == "vision" and isinstance(task, Pathfinder):
        return {"img_size": task.side, "in_chans": 1, "num_classes": 2}
    raise ValueError(
        f"{task.name} is done by models of text (longnet_lm_*, longnet_mlm_*), and pathfinder also "
        f"by longvit_*, got one of modality {modality!r}."
    )


def check_model(model: nn.Module, task: Task, *, name: str) -> None:
    """Refuses a model that cannot do a task.

    Args:
        model: The model.
        task: The task.
        name: What to call it.

    Raises:
        ValueError: It reads something else, or knows too few ids.
    """
    if isinstance(model, TextModel):
        known = min(model.config.vocab_size or 0, model.config.head_size)
        if known < task.vocab_size:
            is_option = any(field.name == "vocab_size" for field in fields(task))
            cure = f"Pass --option vocab_size={known}, train" if is_option and known else "Train"
            raise ValueError(
                f"{task.name} needs a model of at least {task.vocab_size} token ids, got {name} "
                f"with {known}. {cure} one with recipes.long_range, or choose another task."
            )
    elif not (isinstance(model, LongViT) and isinstance(task, Pathfinder)):
        raise ValueError(
            f"{task.name} is done by models of text (longnet_lm_*, longnet_mlm_*), and pathfinder "
            f"also by longvit_*, got {name}, a {type(model).__name__}."
        )
    elif (model.in_chans, model.num_classes) != (1, 2):
        raise ValueError(
            f"pathfinder needs a longvit with in_chans=1 and num_classes=2, got {name} with "
            f"{model.in_chans} and {model.num_classes}. Train one with recipes.long_range."
        )


def answer_logits(
    model: nn.Module, task: Task, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Asks a model for the answers of a batch.

    Args:
        model: A model that `check_model` accepts.
        task: The task.
        batch: `tokens` and `labels`, (b, n), of the task.

    Returns:
        Logits, (a, v), and the right classes, (a,), in the order of the labels in the batch.
    """
    tokens, labels = batch["tokens"], batch["labels"]
    is_asked = labels != IGNORE_INDEX
    if isinstance(model, LongViT):
        assert isinstance(task, Pathfinder)
        images = task.images(tokens).to(next(model.parameters()).dtype)
        return model(images)[is_asked.any(1)], task.classes(labels[is_asked])
    assert isinstance(model, TextModel)
    padding = None
    if not model.config.is_causal:
        if task.mask_id is not None:
            # What a causal model would read next, with the answers hidden where it would read them.
            tokens = torch.where(is_asked, task.mask_id, tokens.roll(-1, dims=1))
        if task.pad_id is not None:
            padding = tokens == task.pad_id
    features = model.forward_features(tokens, key_padding_mask=padding)
    return model.forward_head(features[is_asked]), labels[is_asked]


def flops_per_example(model: nn.Module, task: Task, *, is_training: bool = False) -> int:
    """Counts the FLOPs of one example, with logits where an answer is asked only.

    A backward pass is twice the forward pass, in attention 2.5 times (`DilatedPattern.flops`).

    Args:
        model: A model that `check_model` accepts.
        task: The task.
        is_training: Whether the backward pass counts too.
    """
    config = model.config
    assert isinstance(config, ModelConfig)
    if isinstance(model, LongViT):
        num_tokens = task.seq_len // model.config.patch_size**2
        total = model.flops(num_tokens)
    else:
        assert isinstance(model, TextModel)
        num_tokens, head = task.seq_len, model.head_weight
        assert head is not None
        total = model.flops(num_tokens) - 2 * head.numel() * (num_tokens - task.num_labels)
    if not is_training:
        return total
    forward, backward = (
        config.num_layers * flops
        for flops in config.pattern.flops(
            num_tokens, config.num_heads, config.head_dim, is_causal=config.is_causal
        )
    )
    return 3 * (total - forward) + forward + backward
