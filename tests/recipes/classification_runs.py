"""A tiny classification task and tiny pictures, shared by the tests of the recipes."""

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import longnet_zoo as lz
from recipes.classification import ClassificationTask

CLASSES = ("red", "green", "blue")


class Points(ClassificationTask):
    """Classifies points of a plane by a linear model."""

    def __init__(self, *, num_classes: int = 3, **options: Any) -> None:
        super().__init__(num_classes=num_classes, **options)
        self.model = nn.Linear(2, num_classes)
        self.model.config = lz.model_info("longvit_tiny_patch8_64").config
        optimization = dataclasses.asdict(self.optimization)
        self.save_hyperparameters({"model_name": "points", "optimization": optimization})

    def logits(self, batch: dict[str, Any]) -> Tensor:
        return self.model(batch["points"])

    def labels(self, batch: dict[str, Any]) -> Tensor:
        return batch["labels"]

    def names(self, batch: dict[str, Any]) -> list[str]:
        return batch["names"]


class PointData(L.LightningDataModule):
    """Points around three centres."""

    has_test = True

    def __init__(self, *, labels: list[int] | None = None, classes: Any = CLASSES) -> None:
        super().__init__()
        self.class_names = classes
        labels = [i % 3 for i in range(30)] if labels is None else labels
        draw = torch.Generator().manual_seed(0)
        centres = torch.tensor([[0.0, 4.0], [4.0, -2.0], [-4.0, -2.0]])
        self.samples = [
            {
                "points": centres[max(0, label)] + torch.randn(2, generator=draw),
                "labels": label,
                "names": f"point {i}" if label >= 0 else "",
            }
            for i, label in enumerate(labels)
        ]
        self.class_counts = [labels.count(i) for i in range(3)]

    def _loader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    """Makes a trainer that prints nothing."""
    defaults = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**(defaults | options))


def write_images(folder: Path, *, per_class: int = 6, side: int = 20) -> Path:
    """Writes noisy pictures of three colours, a folder for each."""
    draw = np.random.default_rng(0)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = draw.integers(0, 100, (side, side + 3, 3))
            pixels[:, :, channel] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:02d}.png")
    return folder


def tiny_vit() -> dict[str, Any]:
    """Returns options that make LongViT tiny."""
    return {
        "img_size": 16,
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "segment_lengths": [2, 4],
        "dilation_rates": [1, 2],
    }
