"""Image-text models as open_clip's users expect them: transforms and zero-shot classification."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import Compose  # type: ignore[import-untyped]

from longnet_zoo.factory import create_model
from longnet_zoo.models import LongNetCLIP
from longnet_zoo.registry import find_model

__all__ = ["as_rgb", "create_model_and_transforms", "zero_shot_classifier", "zero_shot_logits"]

# open_clip's crops: texts name what is at the edge, and what is left or right.
_CROP_SCALE = (0.9, 1.0)

Transform = Callable[[Image.Image], Tensor]


def create_model_and_transforms(
    name: str, pretrained: Any = False, **options: Any
) -> tuple[LongNetCLIP, Transform, Transform]:
    """Makes an image-text model, and what prepares its images.

    Both transforms convert to RGB as `as_rgb`, resize and normalise as the image tower wants it.
    The one for training crops at random, at least 90 % of the image; it neither flips nor changes
    colours.

    Args:
        name: A name of `list_models(modality="image-text")`.
        pretrained: As for `create_model`.
        **options: As for `create_model`.

    Returns:
        The model in training mode, the transform for training and that for evaluation. Each
        transform makes a tensor (3, height, width) of a PIL image, and raises ValueError for one
        with more than 8 bits a channel.

    Raises:
        ValueError: If the name is unknown or that of another kind of model, its images are not
            RGB, or as for `create_model`.
        TypeError: As for `create_model`, like all other errors.

    Example:
        >>> model, _, preprocess = create_model_and_transforms("longnet_clip_tiny")
        >>> features = model.eval().encode_image(preprocess(Image.open("cat.png"))[None])
    """
    entry = find_model(name)
    if entry.modality != "image-text":
        raise ValueError(
            f"create_model_and_transforms is for image-text models, got {name!r}, a "
            f"{entry.modality} model. Use create_model, and timm.data.create_transform."
        )
    model = cast(LongNetCLIP, create_model(name, pretrained=pretrained, **options))
    in_chans = model.config.image.in_chans
    if in_chans != 3:
        raise ValueError(
            f"the transforms make RGB images, so image must have in_chans=3, got {in_chans}. Use "
            "create_model, and transforms of your own."
        )
    data = resolve_data_config(model=model.visual)
    train = create_transform(
        **data, is_training=True, scale=_CROP_SCALE, hflip=0.0, color_jitter=0.0
    )
    return model, _of_any_mode(train), _of_any_mode(create_transform(**data))


@torch.no_grad()
def zero_shot_classifier(
    model: LongNetCLIP,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    *,
    batch_size: int = 64,
) -> Tensor:
    """Makes the weights of a classifier of images from the names of its classes.

    Each class is the mean over the templates of the normalised features of its texts, normalised.

    Args:
        model: The model; it is used in evaluation mode and then put back.
        tokenizer: Makes token ids of texts; see `get_tokenizer`.
        class_names: Names of the classes.
        templates: Texts with `{}` in the place of the name, or functions of the name.
        batch_size: Texts that are encoded at once.

    Returns:
        Weights, (output_dim, classes).

    Raises:
        ValueError: If there are no names or templates, a template has no `{}`, or `batch_size` is
            below 1.

    Example:
        >>> weights = zero_shot_classifier(model, tokenizer, ["cat", "dog"], ["a photo of a {}."])
        >>> logits = zero_shot_logits(model, images, weights)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    texts = _fill_in(class_names, templates)
    device = model.logit_scale.device
    with _evaluation(model):
        features = [
            model.encode_text(tokenizer(texts[i : i + batch_size]).to(device), normalize=True)
            for i in range(0, len(texts), batch_size)
        ]
    means = torch.cat(features).unflatten(0, (len(class_names), len(templates))).mean(dim=1)
    return normalize(means, dim=-1).T


@torch.no_grad()
def zero_shot_logits(model: LongNetCLIP, image: Tensor, weights: Tensor) -> Tensor:
    """Classifies images with weights of `zero_shot_classifier`.

    Args:
        model: The model; it is used in evaluation mode and then put back.
        image: Normalised images, (batch, in_chans, height, width).
        weights: Weights, (output_dim, classes).

    Returns:
        Logits, (batch, classes): for a softmax over the classes, or with `loss="sigmoid"` for a
        sigmoid of each.
    """
    with _evaluation(model):
        features, _, scale, *bias = model(image)
    logits = scale * features @ weights
    return logits + bias[0] if bias else logits


@contextmanager
def _evaluation(model: LongNetCLIP) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _fill_in(
    class_names: Sequence[str], templates: Sequence[str | Callable[[str], str]]
) -> list[str]:
    """Texts of all classes, those of a class one after another."""
    if isinstance(class_names, str) or isinstance(templates, str):
        raise TypeError(
            "class_names and templates must be sequences of texts, got one text, "
            f"{class_names if isinstance(class_names, str) else templates!r}. Put it in a list."
        )
    if not class_names or not templates:
        raise ValueError(
            "class_names and templates must hold at least one each, got "
            f"{len(class_names)} and {len(templates)}."
        )
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(
                f"templates must have {{}} in the place of the name, got {template!r}."
            )
    return [
        template(name) if callable(template) else template.replace("{}", name)
        for name in class_names
        for template in templates
    ]


def _of_any_mode(transform: Any) -> Transform:
    """Lets a transform of timm take images that are grey, transparent or turned, too."""
    return Compose([as_rgb, *transform.transforms])


def as_rgb(image: Image.Image) -> Image.Image:
    """Makes an image RGB: upright as its EXIF data say, on white where it is transparent.

    Raises:
        ValueError: If it has more than 8 bits a channel.
    """
    # Pillow cuts 16 bits off at 255, which leaves nearly white.
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"an image must have 8 bits a channel, got Pillow's mode {image.mode!r}. Scale it to "
            "0..255 first."
        )
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
