"""Tiny pairs of pictures and captions, and a tiny model, shared by tests of image-text recipes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

import longnet_zoo as lz
from longnet_zoo.batch_tokenizer import BatchTokenizer
from longnet_zoo.tokenizers import ByteTokenizer
from recipes.image_text_loader import PairEncoder

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def picture(colour: str, number: int, *, side: int = 16) -> Image.Image:
    """Makes a picture of a colour, with some noise."""
    noise = np.random.default_rng(number).integers(-30, 30, (side, side, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def write_table(folder: Path, *, per_colour: int = 6, **changes: Any) -> Path:
    """Writes pictures, and a table of them with captions and classes.

    Args:
        folder: Where to.
        per_colour: Pictures of each of three colours.
        **changes: For the number of a row, from 1, what is other in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(3 * per_colour):
        colour = list(COLOURS)[number % 3]
        name = f"{number:02d}.png"
        picture(colour, number).save(folder / name)
        rows.append({"image": name, "caption": f"{colour} {number}", "colour": colour})
    for row, change in changes.items():
        rows[int(row.removeprefix("row")) - 1] |= change
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def encoder(**options: Any) -> PairEncoder:
    """Makes tensors of 8 x 8 pixels, and of at most 12 bytes."""
    tokenizer = BatchTokenizer(ByteTokenizer(), context_length=12)
    transform = create_transform((3, 8, 8), crop_pct=1.0)
    defaults = {"transform": transform, "tokenizer": tokenizer, "long_captions": "truncate"}
    return PairEncoder(**(defaults | options))


def tiny_options(*, img_size: int = 16) -> dict[str, Any]:
    """Returns options that make the image-text model tiny."""
    tower = {"embed_dim": 16, "num_layers": 1, "num_heads": 2}
    return {
        "output_dim": 16,
        "max_text_len": 64,
        "image": {
            **tower,
            "img_size": img_size,
            "patch_size": 8,
            "segment_lengths": [2, 4],
            "dilation_rates": [1, 2],
        },
        "text": {**tower, "segment_lengths": [8, 16], "dilation_rates": [1, 2]},
    }


def tiny_model(**options: Any) -> torch.nn.Module:
    """Makes a tiny image-text model."""
    return lz.create_model("longnet_clip_tiny", **(tiny_options() | options))
