"""Merges adapters into their base: a plain model of Transformers, with the same outputs.

    python -m recipes.finetune_lora_merge --adapter runs/finetune/adapter --output merged

    import longnet_zoo.interop.transformers
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("merged", attn_implementation="longnet_dilated")

The pattern of dilated attention is a part of the model's configuration; where the training had
none, the two lines about attention go. Adapters that were trained on a base in 4 bits are merged
into the base as it was published.

Shapes: b batch, n seq_len, v vocab_size.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jsonargparse import auto_cli
from torch import Tensor

from recipes.cli import report_error
from recipes.finetune_lora_base import load_whole, quietly

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_adapted", "load_merged", "main", "merge_adapter"]

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "config.json")
# What a folder holds beside weights and configuration.
_OTHER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_PROBE_SHAPE = (2, 128)


def load_adapted(adapter: str | Path, *, base: str | None = None) -> "PeftModel":
    """Loads a base with its adapters, as they were trained but in full precision.

    Args:
        adapter: Folder that a run of `recipes.finetune_lora` wrote.
        base: Folder of the base, or its name on the hub; None takes that of the training.

    Raises:
        ValueError: The folder holds no adapters, or the base lacks weights.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig

    missing = [name for name in _ADAPTER_FILES if not Path(adapter, name).is_file()]
    if missing:
        raise ValueError(
            f"adapter must be a folder that recipes.finetune_lora wrote, got {str(adapter)!r}, "
            f"which has no {' and no '.join(missing)}. Pass runs/NAME/adapter."
        )
    # The configuration of the training: with its positions and its pattern.
    config = AutoConfig.from_pretrained(adapter)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    trained = PeftConfig.from_pretrained(adapter)
    keywords = {"config": config, **_attention(config)}
    if trained.revision is not None and base is None:
        keywords["revision"] = trained.revision
    model = load_whole(base or trained.base_model_name_or_path, **keywords)
    with quietly():
        return PeftModel.from_pretrained(model, str(adapter))


def load_merged(folder: str | Path) -> "PreTrainedModel":
    """Loads a model that `merge_adapter` wrote, with its pattern."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with quietly():
        return AutoModelForCausalLM.from_pretrained(folder, **_attention(config))


def merge_adapter(*, adapter: str, output: str, base: str | None = None) -> str:
    """Writes a base with its adapters merged into its weights.

    Args:
        adapter: Folder of the adapters, `runs/NAME/adapter`.
        output: Folder to write; files of the same names are replaced.
        base: Folder of the base, or its name on the hub; null takes that of the training.

    Returns:
        By how much the logits of the two differ, in a sentence.

    Raises:
        ValueError: The folder holds no adapters.
    """
    adapted = load_adapted(adapter, base=base)
    expected = _logits(adapted)
    with quietly():
        adapted.merge_and_unload().save_pretrained(output)
    _copy_tokenizer(base or adapted.peft_config["default"].base_model_name_or_path, output)
    # Of what was written, and not of what was in memory.
    difference = (_logits(load_merged(output)) - expected).abs().max()
    return (
        f"{output} gives the logits of {adapter}: the largest difference is {difference:.2g}, the "
        f"largest logit {expected.abs().max():.3g}."
    )


def _attention(config: "PretrainedConfig") -> dict[str, str]:
    """Returns the argument that makes a model attend by the pattern in its configuration."""
    if not hasattr(config.get_text_config(), "longnet_pattern"):
        return {}
    from longnet_zoo.interop.transformers import ATTENTION_NAME

    return {"attn_implementation": ATTENTION_NAME}


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    """Returns the logits of some random tokens, (b, n, v)."""
    draw = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocab_size, _PROBE_SHAPE, generator=draw)
    return model.eval()(input_ids=tokens, use_cache=False).logits.float()


def _copy_tokenizer(base: str, output: str) -> None:
    if not Path(base).is_dir():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(base).save_pretrained(output)
        return
    for name in _OTHER_FILES:
        if Path(base, name).is_file():
            shutil.copyfile(Path(base, name), Path(output, name))


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    try:
        print(auto_cli(merge_adapter, args=args, as_positional=False))
    except Exception as error:
        report_error(error)


if __name__ == "__main__":
    main()
