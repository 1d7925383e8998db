"""Hugging Face causal language models with LoRA adapters, with the methods of a text model here.

LoRA (arXiv 2106.09685) leaves the base as it is and adds a product of two thin matrices to each of
its linear layers; QLoRA (arXiv 2305.14314) keeps the base in 4 bits. Adapters are PEFT's.

Shapes: b batch, n seq_len, e embed_dim, v vocab_size.
"""

import dataclasses
import inspect
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.ops.cross_entropy import linear_cross_entropy
from longnet_zoo.ops.sampling import draw_tokens
from longnet_zoo.tokenizers import Tokenizer
from recipes.finetune_lora_base import has_linear_head, quietly
from recipes.sampling import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AdaptedLM", "LoraOptions", "token_losses"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Which layers get an adapter, and how large it is.

    Attributes:
        rank: Columns of the thin matrices.
        alpha: An adapter's product is multiplied by alpha / rank.
        dropout: Share of an adapter's inputs that training sets to 0.
        target_modules: "all-linear" (all but the head), or the ends of the names of the layers.
        use_rslora: Whether to multiply by alpha / sqrt(rank) instead (arXiv 2312.03732).
        use_dora: Whether to train the length of each weight's rows apart (arXiv 2402.09353).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {name}={getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got dropout={self.dropout}.")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))


class AdaptedLM(nn.Module):
    """A causal language model whose adapters train and whose own weights do not.

    Args:
        base: Model of Transformers with a head, as `load_base` returns it.
        lora: The adapters.
        gradient_checkpointing: Whether training keeps the inputs of layers only, and computes the
            rest again in the backward pass.
        revision: Branch, tag or commit of the base on the hub, for whoever loads the adapters.

    Raises:
        ValueError: No layer has one of the names in `target_modules`.
    """

    def __init__(
        self,
        base: "PreTrainedModel",
        *,
        lora: LoraOptions,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        import peft

        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_checked_targets(base, lora.target_modules),
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
        )
        with quietly():
            if gradient_checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            self.peft = peft.get_peft_model(base, config, revision=revision)
        self.is_head_linear = has_linear_head(base)
        # A loaded model is in evaluation mode, which Lightning would keep.
        self.train()

    @property
    def base(self) -> "PreTrainedModel":
        """The model of Transformers, with the adapters in its layers."""
        return self.peft.get_base_model()

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.base.get_input_embeddings().num_embeddings

    def num_params(self, *, trainable_only: bool = False) -> int:
        """Counts the parameters of base and adapters, or only those that train."""
        trainable, total = self.peft.get_nb_trainable_parameters()
        return trainable if trainable_only else total

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Computes the cross-entropy of the token that follows each one.

        Args:
            tokens: Token ids, (b, n).
            labels: The tokens that follow, (b, n), `ignore_index` where there is no loss.
            ignore_index: Label of tokens without a loss.
            reduction: "mean" over the labels, "sum" or "none".
            key_padding_mask: None: rows are full.
            cu_seqlens: Where the sequences of a single row begin, and its end,
                (num_sequences + 1,); None: each row is one sequence.

        Raises:
            NotImplementedError: Rows are padded.
        """
        if key_padding_mask is not None:
            raise NotImplementedError(
                "rows must be full, got key_padding_mask of shape "
                f"{tuple(key_padding_mask.shape)}. Pack sequences into rows, with cu_seqlens."
            )
        losses = token_losses(
            self.base,
            tokens,
            labels,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
            is_head_linear=self.is_head_linear,
        )
        if reduction == "none":
            return losses
        num_labels = (labels != ignore_index).sum().clamp(min=1)
        return losses.sum() / num_labels if reduction == "mean" else losses.sum()

    @torch.no_grad()
    def write(self, prompt: Tensor, tokenizer: Tokenizer, *, config: SamplingConfig) -> list[int]:
        """Continues a prompt, with a cache of keys and values.

        Args:
            prompt: Token ids, (n,).
            tokenizer: Says which token ends a document, and which are never written.
            config: How to draw, and when to stop.

        Returns:
            The new token ids.
        """
        generator = torch.Generator(prompt.device).manual_seed(config.seed)
        banned = sorted({tokenizer.mask_id, tokenizer.pad_id} - {None})
        banned += range(tokenizer.vocab_size, self.vocab_size)
        seen = torch.zeros(1, self.vocab_size, dtype=torch.bool, device=prompt.device)
        new, cache, written = prompt[None], None, []
        for _ in range(config.max_new_tokens):
            out = self.base(input_ids=new, past_key_values=cache, use_cache=True)
            cache, seen[0, new[0]] = out.past_key_values, True
            logits = out.logits[:, -1]
            token = draw_tokens(logits, config, generator=generator, seen=seen, banned_ids=banned)
            written.append(int(token))
            text = tokenizer.decode(written)
            if written[-1] == tokenizer.eod_id or any(x in text for x in config.stop_strings):
                break
            new = token[:, None]
        return written

    def without_adapters(self) -> AbstractContextManager[None]:
        """Returns a context in which it is the base alone."""
        return self.peft.disable_adapter()

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapters as PEFT does, and the configuration of the model beside them.

        Args:
            folder: Folder; made if there is none.
        """
        # "auto" would look on the hub whether the embedding has grown.
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        # It says what `model_options` and the pattern have changed, for whoever merges.
        self.base.config.save_pretrained(str(folder))


def token_losses(
    model: "PreTrainedModel",
    tokens: Tensor,
    labels: Tensor,
    *,
    is_head_linear: bool,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Computes the loss of each token, if possible without the logits of the whole sequence.

    Args:
        model: Causal language model of Transformers.
        tokens: Token ids, (b, n).
        labels: The tokens that follow, (b, n), `ignore_index` where there is no loss.
        is_head_linear: Whether the logits are a linear layer of the features (`has_linear_head`);
            then those of a chunk of tokens exist at a time.
        cu_seqlens: Where the sequences of a single row begin, and its end, (num_sequences + 1,);
            None: each row is one sequence.
        ignore_index: Label of tokens without a loss.

    Returns:
        Losses in nats, float32 (b, n), 0 where there is none.
    """
    inputs = {"input_ids": tokens, "use_cache": False}
    if cu_seqlens is not None:
        if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise NotImplementedError(
                "the boundaries of documents need a base with position_ids, got a "
                f"{type(model).__name__}. Set data.confine_to_document to false."
            )
        # Transformers takes positions that begin again for the boundaries of sequences.
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inputs["position_ids"] = (places - starts)[None]
    if not is_head_linear:
        logits = model(**inputs).logits.float()
        options = {"ignore_index": ignore_index, "reduction": "none"}
        return functional.cross_entropy(logits.transpose(1, 2), labels, **options)
    features = model.base_model(**inputs).last_hidden_state
    head = model.get_output_embeddings()
    return linear_cross_entropy(
        features.to(head.weight.dtype),
        head.weight,
        labels,
        bias=head.bias,
        ignore_index=ignore_index,
        reduction="none",
    )


def _checked_targets(base: "PreTrainedModel", targets: str | tuple[str, ...]) -> str | list[str]:
    """Returns the layers to adapt in PEFT's form, a name or a list.

    PEFT's own check lets names pass that match nothing beside others that do.
    """
    if targets == "all-linear":
        return "all-linear"
    names = [targets] if isinstance(targets, str) else list(targets)
    # Matrices, also those of GPT-2, which are no torch.nn.Linear.
    layers = [
        name
        for name, module in base.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    unknown = [x for x in names if not any(f".{layer}".endswith(f".{x}") for layer in layers)]
    if unknown or not names:
        ends = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
        raise ValueError(
            f"target_modules must be 'all-linear' or name layers of the base, got {names}, of "
            f"which {unknown or 'none'} match nothing. {type(base).__name__} has {', '.join(ends)}."
        )
    return names
