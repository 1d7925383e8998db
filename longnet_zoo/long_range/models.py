"""Finding the models of an evaluation: LABEL=SOURCE, where a label may have several runs."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import longnet_zoo.models as zoo
from longnet_zoo.factory import create_model, list_models
from longnet_zoo.models import ZooModel
from longnet_zoo.registry import find_model
from longnet_zoo.weights.checkpoint import read_checkpoint

from .table import GUESSES

__all__ = ["TRAINING_FILE", "Source", "find_sources", "load_source"]

# Beside the weights of a run: what it was trained on, and how much.
TRAINING_FILE = "training.json"
_CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One model to evaluate.

    Attributes:
        label: What it is called in the table; runs with the same one are averaged.
        place: Name in the registry, folder or checkpoint.
    """

    label: str
    place: str


def find_sources(words: list[str]) -> list[Source]:
    """Reads `LABEL=SOURCE` or `SOURCE`; a pattern such as `runs/a-*/model` is several sources.

    Args:
        words: As they are typed.

    Raises:
        ValueError: There is nothing at a place, or a label is the name of a guess.
    """
    sources = []
    for word in words:
        label, separator, place = word.partition("=")
        if not separator:
            label = place = word
        if not label or not place:
            raise ValueError(f"--models takes LABEL=SOURCE or SOURCE, got {word!r}.")
        if label in GUESSES:
            raise ValueError(
                f"--models needs other labels than {' and '.join(GUESSES)}, which every table has, "
                f"got {word!r}. Give another LABEL=."
            )
        path = Path(place).expanduser()
        is_one = place in list_models() or path.exists()
        places = [place] if is_one else sorted(glob.glob(str(path)))
        if not places:
            raise ValueError(
                f"--models found nothing at {place!r}. Give the name of a model (`longnet-zoo "
                "list`), a folder that save_pretrained wrote, or the checkpoint of a recipe."
            )
        for found in (Source(label=label, place=place) for place in places):
            if found in sources:
                raise ValueError(
                    f"--models takes a run once, got {found.place!r} twice as {label!r}. Leave one "
                    "out, or give it another label."
                )
            sources.append(found)
    return sources


def load_source(source: Source) -> tuple[nn.Module, Mapping[str, Any]]:
    """Loads a model in evaluation mode.

    Args:
        source: Where it is.

    Returns:
        The model, and what is known of its training: empty for models that are not of
        `recipes.long_range`.

    Raises:
        ValueError: The model has no weights, or the place holds none of our models.
    """
    path = Path(source.place)
    if source.place in list_models():
        if not find_model(source.place).weights:
            raise ValueError(
                f"{source.place} has no published weights, so there is nothing to evaluate. Train "
                "it with recipes.long_range, and give the folder `model` of the run."
            )
        return create_model(source.place, pretrained=True).eval(), {}
    if not path.is_dir():
        name = read_checkpoint(path).model_name
        if name is None:
            raise ValueError(
                f"--models takes the checkpoints of recipes, got {source.place!r}, which names no "
                "model. Save it by save_pretrained, and give that folder."
            )
        return create_model(name, pretrained=path).eval(), {}
    return _load_folder(path)


def _load_folder(path: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    config, training = path / _CONFIG_FILE, path / TRAINING_FILE
    if not config.is_file():
        raise ValueError(
            f"--models takes folders that save_pretrained wrote, got {str(path)!r}, which has no "
            f"{_CONFIG_FILE}. Of a run of recipes.long_range give its folder `model`."
        )
    model_class = getattr(zoo, str(_read_object(config).get("model")), None)
    if not (
        isinstance(model_class, type)
        and issubclass(model_class, ZooModel)
        and hasattr(model_class, "config_class")  # base classes have none
    ):
        raise ValueError(
            f"--models takes folders that save_pretrained wrote, got {str(path)!r}, whose "
            f"{_CONFIG_FILE} names no model of the zoo."
        )
    known = _read_training(training) if training.is_file() else {}
    return model_class.from_pretrained(path).eval(), known


def _read_training(file: Path) -> dict[str, Any]:
    known = _read_object(file)
    flops, seq_len = known.get("train_flops", 0), known.get("seq_len", 1)
    if not isinstance(flops, int | float) or not math.isfinite(flops) or type(seq_len) is not int:
        raise ValueError(
            f"{file} must have numbers for train_flops and seq_len, got {flops!r} and {seq_len!r}. "
            "Write it again, or remove it."
        )
    return known


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} must hold a JSON object, got: {error}. Write it again."
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{file} must hold a JSON object, got a {kind}. Write it again.")
    return content
