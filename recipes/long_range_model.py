"""A model of the zoo made for a long-range task, with dilated or dense attention."""

from typing import Any, Literal

from torch import nn

import longnet_zoo as lz
from longnet_zoo.long_range import Task, check_model, options_for
from longnet_zoo.ops.pattern import DENSE_SEGMENT
from longnet_zoo.registry import find_model
from recipes.classifiers import changed_options

__all__ = ["make_model"]


def make_model(
    task: Task,
    *,
    name: str,
    pretrained: bool | str,
    options: dict[str, Any],
    attention: Literal["dilated", "dense"],
    segment_lengths: tuple[int, ...] | None,
    dilation_rates: tuple[int, ...] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Makes a model whose vocabulary or classes, and attention, follow from other settings.

    Args:
        task: The task.
        name: Name in the registry.
        pretrained: Weights to start from, as in `longnet_zoo.create_model`; they need the
            vocabulary of the task.
        options: Other options of the model. Those that follow may be among them, as a checkpoint
            has them, but not with other values.
        attention: "dilated", or "dense" for one segment.
        segment_lengths: Segments of dilated attention; None: those of the model.
        dilation_rates: Their rates; None: those of the model.

    Returns:
        The model, and the options that make it again.

    Raises:
        ValueError: The model cannot do the task, its segments are too short for it, an option is
            another one than what follows, or the weights do not fit.
    """
    if attention not in ("dilated", "dense"):
        raise ValueError(f"attention must be 'dilated' or 'dense', got {attention!r}.")
    entry = find_model(name)
    fixed = options_for(task, modality=entry.modality)
    if attention == "dense":
        fixed |= {"segment_lengths": (DENSE_SEGMENT,), "dilation_rates": (1,)}
    else:
        fixed["segment_lengths"] = tuple(segment_lengths or entry.config.segment_lengths)
        fixed["dilation_rates"] = tuple(dilation_rates or entry.config.dilation_rates)
    _check_fixed(options, fixed)
    model = lz.create_model(name, pretrained=pretrained, **{**options, **fixed})
    check_model(model, task, name=name)
    _check_reach(model, task)
    saved = changed_options(model, name)
    # The recipes of classifiers keep it elsewhere.
    return model, {**saved, **{key: fixed[key] for key in ("num_classes",) if key in fixed}}


def _check_fixed(options: dict[str, Any], fixed: dict[str, Any]) -> None:
    for name, value in fixed.items():
        given = options.get(name, value)
        given = tuple(given) if isinstance(given, list) else given
        if given not in (value, (value, value)):  # a side of an image, or both
            raise ValueError(
                f"model_options.{name} follows from task, attention, segment_lengths and "
                f"dilation_rates of the model section, which make it {value}, got {given}. Leave "
                "it out there; a checkpoint needs the settings that it was trained with."
            )


def _check_reach(model: nn.Module, task: Task) -> None:
    """Refuses segments across whose borders nothing passes, in whatever number of layers."""
    patch_size = getattr(model.config, "patch_size", 1)
    num_tokens, longest = task.seq_len // patch_size**2, model.config.segment_lengths[-1]
    if longest < num_tokens:
        raise ValueError(
            f"the longest segment must hold the whole sequence, or its beginning is lost to its "
            f"end, got segment_lengths={list(model.config.segment_lengths)} and {num_tokens} "
            f"tokens. Set model.segment_lengths, the last one to {num_tokens}."
        )
