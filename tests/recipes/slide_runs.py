"""Tiny slides in files, and options of a tiny encoder, shared by the tests of the slide recipe."""

import csv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DIM = 5
CLASSES = ("left", "right")


def draw_slide(index: int, *, num_tiles: int, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles in a row; the first channel of one half of them is large."""
    draw = torch.Generator().manual_seed(index)
    tiles = torch.randn(num_tiles, dim, generator=draw)
    half = slice(0, num_tiles // 2) if index % 2 == 0 else slice(num_tiles // 2, None)
    tiles[half, 0] += 5
    x = torch.arange(num_tiles) * 256
    return tiles, torch.stack([x, torch.zeros_like(x)], dim=1)


def write_slides(folder: Path, *, count: int = 12, dim: int = DIM) -> Path:
    """Writes slides of different length, whose classes alternate."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        tiles, coords = draw_slide(index, num_tiles=7 + index % 4, dim=dim)
        path = folder / f"slide_{index:02d}.safetensors"
        save_file({"features": tiles, "coords": coords}, path)
    return folder


def write_labels(path: Path, *, count: int = 12, **columns: Any) -> Path:
    """Writes the table of `write_slides`: half to train on, or as `columns` say."""
    splits = ["train"] * (count // 2) + ["val"] * (count // 4)
    columns = {"split": splits + ["test"] * (count - len(splits)), **columns}
    columns = {name: values for name, values in columns.items() if values is not None}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "label", *columns])
        for i in range(count):
            row = [values[i] for values in columns.values()]
            writer.writerow([f"slide_{i:02d}", CLASSES[i % 2], *row])
    return path


def tiny_encoder(**changes: Any) -> dict[str, Any]:
    """Returns options that make a slide encoder tiny."""
    return {
        "input_dim": DIM,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "segment_lengths": [4, 11],
        "dilation_rates": [1, 2],
        "dropout": 0.0,
        "drop_path": 0.0,
        **changes,
    }
