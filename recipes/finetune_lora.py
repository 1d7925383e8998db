r"""Fine-tunes a causal language model of Hugging Face Transformers with LoRA or QLoRA.

    python -m recipes.finetune_lora_quickstart
    python -m recipes.finetune_lora fit --config configs/finetune/quickstart.yaml
    python -m recipes.finetune_lora fit --config configs/finetune/quickstart.yaml --ckpt_path last
    python -m recipes.finetune_lora test --config configs/finetune/quickstart.yaml
    python -m recipes.finetune_lora predict --config configs/finetune/quickstart.yaml
    python -m recipes.finetune_lora_merge --adapter runs/finetune/adapter --output merged

Every option: `python -m recipes.finetune_lora fit --help`. A run leaves its adapters in
`adapter/` of its folder, for `peft.PeftModel.from_pretrained`; its checkpoints hold them and the
optimizer, and no weight of the base. Shapes: b batch, n seq_len.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from longnet_zoo import DilatedPattern
from longnet_zoo.text.generation import printable
from longnet_zoo.tokenizers import ByteTokenizer, Tokenizer
from recipes.checkpoints import check_state_dict
from recipes.cli import run
from recipes.context_warmup import ContextWarmup
from recipes.finetune_lora_base import Quantization, load_base
from recipes.finetune_lora_model import AdaptedLM, LoraOptions
from recipes.metrics import BitsPerByte
from recipes.optimization import OptimizationConfig
from recipes.sampling import SamplingConfig
from recipes.text_data import TextDataModule
from recipes.text_lm import TextLM

__all__ = ["LoraFinetuning", "main"]

# Models of bytes have some ids beside the 256.
_MOST_BYTE_IDS = 512


class LoraFinetuning(TextLM):
    """A causal language model of Transformers whose adapters are trained.

    Args:
        model_name: Folder of the base, or its name on the hub.
        model_options: Arguments of `from_pretrained` for it, such as `dtype`, `revision` or
            `rope_parameters`.
        lora: The adapters.
        quantization: "4bit" keeps the base's linear layers in 4 bits (QLoRA), by bitsandbytes.
        pattern: Dilated attention in place of the base's own; null keeps that.
        chunk_size: Tokens that pass through a feed-forward network at once (blockwise); null
            takes all.
        gradient_checkpointing: Whether training keeps only the inputs of layers.
        optimization: Optimizer and learning rate.
        context_warmup: How the context of training batches grows to the whole window; null starts
            with the whole window.
        sampling: How `predict` and the report write text.
    """

    def __init__(
        self,
        *,
        model_name: str | None = None,
        model_options: dict[str, Any] | None = None,
        lora: LoraOptions = LoraOptions(),  # noqa: B008 - frozen
        quantization: Quantization = "none",
        pattern: DilatedPattern | None = None,
        chunk_size: int | None = None,
        gradient_checkpointing: bool = False,
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008 - frozen
        context_warmup: ContextWarmup | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    ) -> None:
        # Not that of TextLM, whose models are registered ones.
        L.LightningModule.__init__(self)
        if model_name is None:
            raise ValueError(
                "fine-tuning needs a base, got model_name=None. Pass a folder or a name on the hub."
            )
        self.optimization = OptimizationConfig.of(optimization)
        lora = LoraOptions(**lora) if isinstance(lora, dict) else lora
        pattern = DilatedPattern(**pattern) if isinstance(pattern, dict) else pattern
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "model_name": model_name,
                "model_options": model_options,
                "lora": dataclasses.asdict(lora),
                "quantization": quantization,
                "pattern": pattern and dataclasses.asdict(pattern),
                "chunk_size": chunk_size,
                "gradient_checkpointing": gradient_checkpointing,
                "optimization": dataclasses.asdict(self.optimization),
            }
        )
        base = load_base(
            model_name,
            options=model_options,
            pattern=pattern,
            chunk_size=chunk_size,
            quantization=quantization,
        )
        self.model = AdaptedLM(
            base,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            revision=(model_options or {}).get("revision"),
        )
        self.context_warmup, self.sampling = context_warmup, sampling
        self.prompts = sampling.prompts or self.default_prompts
        self.tokenizer: Tokenizer | None = None
        self.register_buffer("token_bytes", None, persistent=False)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.held_out = BitsPerByte()

    def setup(self, stage: str) -> None:
        """Checks the strategy, and the data as every text recipe does."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                "LoRA trains on one device or on several by DDP, got trainer.strategy="
                f"{type(strategy).__name__}, which would split a model of Transformers. Set "
                "trainer.strategy to ddp."
            )
        super().setup(stage)

    def attach_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Takes a tokenizer, which says how many bytes a token stands for.

        Raises:
            ValueError: It is not the one that the base was trained with.
        """
        base, vocab_size = self.hparams["model_name"], self.model.vocab_size
        # Bytes fit into every larger vocabulary, where they mean something else.
        is_other = isinstance(tokenizer, ByteTokenizer) and vocab_size > _MOST_BYTE_IDS
        if vocab_size < tokenizer.vocab_size or is_other:
            raise ValueError(
                f"a base reads with the tokenizer that it was trained with, got {base} with "
                f"{vocab_size:,} ids and a {type(tokenizer).__name__} with "
                f"{tokenizer.vocab_size:,}. Set data.tokenizer to the tokenizer.json of the base."
            )
        self.tokenizer = tokenizer
        self.token_bytes = tokenizer.token_bytes.to(self.device)

    def on_fit_start(self) -> None:
        """Says how much is trained."""
        trained, total = self.model.num_params(trainable_only=True), self.model.num_params()
        if self.trainer.is_global_zero:
            print(f"Adapters train: {trained:,} parameters, {trained / total:.2%} of all.")

    def sample(self, prompt: str) -> str:
        """Returns a prompt and the model's continuation of it."""
        assert self.tokenizer is not None
        ids = torch.from_numpy(self.tokenizer.encode_batch([prompt.encode()])[0].astype("int64"))
        new = self.model.write(ids.to(self.device), self.tokenizer, config=self.sampling)
        return printable(prompt + self.tokenizer.decode(new))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the adapters alone: the base is in a folder of its own."""
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        prefix = kwargs.get("prefix", "")
        return {
            name: value
            for name, value in super().state_dict(*args, **kwargs).items()
            if name.removeprefix(prefix) in trained
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes the adapters, and leaves the base as it is.

        Raises:
            ValueError: They are not those of this model, and `strict` is true.
        """
        if strict:
            check_state_dict(self.state_dict(), state_dict)
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        return type(found)([], found.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the same adapters into `adapter/` of the run folder, for PEFT."""
        if self.trainer.is_global_zero:
            self.model.save_adapter(Path(self.trainer.default_root_dir, "adapter"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the adapters of another base or with other settings.

        Raises:
            ValueError: Something that changes what is computed differs; the message says what.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["hyper_parameters"]
        for name in ("model_options", "lora", "quantization", "pattern"):
            if (self.hparams[name] or {}) != (saved[name] or {}):
                raise ValueError(
                    f"adapters go on with the settings that they were trained with, got model."
                    f"{name}={self.hparams[name]} and a checkpoint of {saved[name]}. Set it to "
                    "that, or start anew without ckpt_path."
                )


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(LoraFinetuning, TextDataModule, args=args)


if __name__ == "__main__":
    main()
