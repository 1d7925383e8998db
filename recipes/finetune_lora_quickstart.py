"""Makes what `configs/finetune/quickstart.yaml` needs: a small base, and text it has not seen.

    python -m recipes.finetune_lora_quickstart

    runs/finetune_base/
      model/   a Llama of 0.9M parameters, trained on the Python standard library, byte by byte
      prose/   the Python language reference, one file a topic: English, and no code of the library

The prose is the text of `help()`, which every Python brings along as `pydoc_data` (PSF licence).
"""

import importlib
import math
import time
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jsonargparse import auto_cli

from recipes.cli import report_error
from recipes.context_warmup import ContextWarmup
from recipes.data_options import check_least
from recipes.finetune_lora_base import quietly
from recipes.finetune_lora_model import token_losses
from recipes.optimization import OptimizationConfig
from recipes.text_data import TextDataModule

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["main", "make_quickstart", "write_prose"]

_LOG_SECONDS = 15.0


def make_quickstart(
    *,
    folder: str = "runs/finetune_base",
    steps: int = 600,
    seq_len: int = 4096,
    hidden_size: int = 128,
    num_layers: int = 4,
    source: str = "stdlib",
    seed: int = 0,
) -> str:
    """Trains a base on source code, and writes prose to fine-tune it on.

    Args:
        folder: Where to; `model/` and `prose/` in it are replaced.
        steps: Training steps.
        seq_len: Context in tokens, at which training arrives; it begins with short ones.
        hidden_size: Features of a token, a multiple of 32.
        num_layers: Layers.
        source: Text to train on, as in `recipes.text_data`.
        seed: Start of the random numbers.

    Returns:
        What was made, in a sentence.

    Raises:
        ValueError: An option is out of range, or the source cannot be read.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    check_least(steps=(steps, 1), seq_len=(seq_len, 1), num_layers=(num_layers, 1))
    if hidden_size < 32 or hidden_size % 32:
        raise ValueError(f"hidden_size must be a multiple of 32, got {hidden_size}.")
    data = TextDataModule(source=source, seq_len=seq_len, seed=seed)
    data.setup("fit")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=data.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            max_position_embeddings=seq_len,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=data.tokenizer.eod_id,
        )
    )
    print(f"Training a Llama of {model.num_parameters():,} parameters on {source}")
    bits_per_byte = _train(model, data, steps)
    with quietly():
        model.save_pretrained(Path(folder, "model"))
    write_prose(Path(folder, "prose"))
    return f"{folder}/model reads source code at {bits_per_byte:.2f} bits per byte."


def write_prose(folder: Path) -> None:
    """Writes the language reference, a file for each topic.

    Args:
        folder: Folder; files of the same names are replaced.

    Raises:
        RuntimeError: This Python comes without it.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise RuntimeError(
            "the prose is the module pydoc_data.topics of the standard library, and this Python "
            "comes without it. Install the whole standard library (python3, not python3-minimal)."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def _train(model: "LlamaForCausalLM", data: TextDataModule, steps: int) -> float:
    """Trains the model; returns the bits per byte of the last tenth."""
    config = OptimizationConfig(
        optimizer="muon", lr=1.2e-2, warmup_steps=steps // 20, decay="cosine", final_lr_factor=0.02
    )
    built = config.build(model, run_steps=steps)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    warmup = ContextWarmup(start=256, steps=steps)
    batches = chain.from_iterable(repeat(data.train_dataloader()))
    sums: list[tuple[float, int]] = []
    shown = time.perf_counter()
    for step, batch in enumerate(islice(batches, steps), start=1):
        batch = warmup.cut(batch, step)
        losses = token_losses(model, batch["tokens"], batch["labels"], is_head_linear=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        num_bytes = int(data.token_bytes[batch["labels"]].sum())
        sums.append((float(losses.detach().sum()), num_bytes))
        if time.perf_counter() - shown > _LOG_SECONDS:
            print(f"step {step}/{steps}  {_bits_per_byte(sums[-20:]):.3f} bits/byte", flush=True)
            shown = time.perf_counter()
    return _bits_per_byte(sums[-(steps // 10 + 1) :])


def _bits_per_byte(sums: list[tuple[float, int]]) -> float:
    """Returns the mean over steps, of which each is its nats and its bytes."""
    nats, num_bytes = (sum(column) for column in zip(*sums, strict=True))
    return nats / math.log(2) / num_bytes


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    try:
        print(auto_cli(make_quickstart, args=args, as_positional=False))
    except Exception as error:
        report_error(error)


if __name__ == "__main__":
    main()
