"""Tiny captioning runs, tables and shards of coloured squares, shared by tests."""

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.captioning import Captioner
from recipes.captioning_data import CaptionDataModule

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
TINY = {
    "img_size": 16,
    "patch_size": 8,
    "vocab_size": 259,
    "max_text_len": 24,
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_dim": 24,
    "segment_lengths": [4, 32],
    "dilation_rates": [1, 2],
}


def square(colour, number):
    """An image of a colour, with some noise."""
    noise = np.random.default_rng(number).integers(-20, 20, (20, 24, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def pairs(count=24):
    """Name, image and caption of squares."""
    colours = list(COLOURS)
    for number in range(count):
        colour = colours[number % 3]
        yield f"{number:03d}", square(colour, number), f"a {colour} one"


def write_table(folder: Path, count=24):
    """Writes a table of squares: the first two thirds for training, the rest for both others."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        for number, (name, image, caption) in enumerate(pairs(count)):
            image.save(folder / f"{name}.png")
            split = "train" if number < 2 * count // 3 else ("val", "test")[number % 2]
            table.writerow([f"{name}.png", caption, split])
    return folder


def write_shard(path: Path, count=24, *, damaged=()):
    """Writes a shard of squares; of damaged ones the image lacks its end."""
    with tarfile.open(path, "w") as shard:
        for number, (name, image, caption) in enumerate(pairs(count)):
            content = io.BytesIO()
            image.save(content, "png")
            data = content.getvalue()
            for suffix, part in (
                ("png", data[: len(data) // 2] if number in damaged else data),
                ("txt", caption.encode()),
            ):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(part)
                shard.addfile(info, io.BytesIO(part))
    return path


def make_task(**options):
    return Captioner(**({"model_options": TINY, "max_new_tokens": 12} | options))


def make_data(folder: Path, **options):
    return CaptionDataModule(**({"source": str(folder), "batch_size": 4} | options))
