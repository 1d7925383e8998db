"""A tiny base, another text, and tiny fine-tunings, shared by tests."""

import random
from pathlib import Path
from typing import Any

from recipes.finetune_lora import LoraFinetuning
from recipes.finetune_lora_base import quietly
from recipes.finetune_lora_quickstart import make_quickstart
from recipes.optimization import OptimizationConfig
from recipes.text_data import TextDataModule
from tests.recipes.text_runs import write_corpus

# The letters that the base has read, in other words.
OTHER_WORDS = ("nruter", "tropmi", "fles", "ssalc", "eulav", "xedni", "rof", "elihw")
# Sizes of a model of one layer that has learned nothing.
TOY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
}
PATTERN = {"segment_lengths": [16, 48], "dilation_rates": [1, 2]}


def write_other_text(folder: Path) -> Path:
    """Writes 40 files of words that the base has never seen."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for number in range(40):
        lines = [" ".join(draw.choices(OTHER_WORDS, k=6)) for _ in range(20)]
        (folder / f"file_{number:02d}.txt").write_text("\n".join(lines))
    return folder


def make_base(folder: Path) -> Path:
    """Trains a base of two layers for a few steps, and returns its folder."""
    corpus = write_corpus(folder / "code")
    make_quickstart(
        folder=str(folder), source=str(corpus), steps=80, seq_len=64, hidden_size=64, num_layers=2
    )
    return folder / "model"


def save_toy(network: Any, config: Any, folder: Path) -> Path:
    """Writes a model with random weights, of a class and config of Transformers."""
    with quietly():
        network(config).save_pretrained(folder)
    return folder


def make_task(base: Path, **options: Any) -> LoraFinetuning:
    """Makes a task of adapters that learn fast."""
    defaults = {
        "model_name": str(base),
        "optimization": OptimizationConfig(
            optimizer="muon", lr=2e-2, warmup_steps=2, decay_steps=40
        ),
    }
    return LoraFinetuning(**(defaults | options))


def make_other_data(text: Path, **options: Any) -> TextDataModule:
    """Makes the data of the other text."""
    return TextDataModule(source=str(text), **{"seq_len": 64, "batch_size": 4, **options})


def arguments(base: Path, text: Path, run_dir: Path, **changes: Any) -> list[str]:
    """Returns command-line arguments of a tiny run, `section__name=value` changing one."""
    options = {
        "trainer__accelerator": "cpu",
        "trainer__max_steps": 6,
        "trainer__log_every_n_steps": 1,
        "trainer__val_check_interval": 3,
        "trainer__check_val_every_n_epoch": "null",
        "trainer__limit_val_batches": 2,
        "trainer__default_root_dir": run_dir,
        "model__model_name": base,
        "model__lora__rank": 4,
        "model__lora__dropout": 0.1,
        "model__optimization__decay_steps": 20,
        "data__source": text,
        "data__seq_len": 64,
        "data__batch_size": 2,
    }
    options |= changes
    return [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
