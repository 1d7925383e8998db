"""Our text models as models of Hugging Face Transformers.

The mathematics is that of `LongNetLM` and `LongNetMLM`: `LongNetModel` holds one without its head,
as `network`; the heads hold a `LongNetModel`. Importing this module registers them with the Auto
classes.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

from .backbone import LongNetModel
from .base import choose
from .cache import LongNetCache
from .config import LongNetConfig
from .heads import LongNetWithHead

__all__ = ["LongNetForCausalLM", "LongNetForMaskedLM", "LongNetModel"]


class LongNetForCausalLM(LongNetWithHead, GenerationMixin):
    """Causal language model: `LongNetLM` with Transformers' conventions.

    In training no logits exist: the loss is made from the features, chunk by chunk, so that long
    sequences fit. Pass `logits_to_keep=0` to have them all the same.

    Args:
        config: The options, with `is_causal=True`.

    Raises:
        ValueError: If the config is of a bidirectional model.

    Example:
        >>> model = LongNetForCausalLM(LongNetConfig(vocab_size=259, num_layers=2))
        >>> tokens = torch.randint(259, (1, 4096))
        >>> model(tokens, labels=tokens).loss.backward()
    """

    needs_causal = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Computes logits, and with labels the loss.

        Args:
            input_ids: As for `LongNetModel`, like all arguments that are not in this list.
            attention_mask: As for `LongNetModel`.
            inputs_embeds: As for `LongNetModel`.
            labels: The tokens themselves, int64 (batch, seq_len), -100 where there is no loss: the
                label of a position is what the position before must predict.
            past_key_values: As for `LongNetModel`.
            use_cache: As for `LongNetModel`.
            output_attentions: As for `LongNetModel`.
            output_hidden_states: As for `LongNetModel`.
            return_dict: As for `LongNetModel`.
            logits_to_keep: Number of last positions that get logits, 0 for all, or their indices,
                (positions,). None: all, but in training with labels none.
            num_items_in_batch: What the sum of the losses is divided by; None: the labels here.

        Returns:
            `loss` (float32), `logits`, (batch, positions, vocab_size), and what was asked for.

        Raises:
            ValueError: If shapes, token ids or options do not fit.
            NotImplementedError: As for `LongNetModel`.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        features, loss = outputs.last_hidden_state, None
        if labels is not None:
            shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = self.head_loss(features, shifted, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=self._logits(features, logits_to_keep, has_labels=labels is not None),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if choose(return_dict, self.config.return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Makes the arguments of `forward`; `generate` calls it before each token.

        Args:
            *args: The tokens so far; see Transformers.
            inputs_embeds: Embeddings of the prompt instead.
            **kwargs: Other options of `generate`; see Transformers.
        """
        mixin: Any = super()
        inputs = mixin.prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        # Stop strings bring it, and Transformers hands it on to every model.
        inputs.pop("tokenizer", None)
        return inputs

    def _logits(
        self, features: Tensor, keep: int | Tensor | None, *, has_labels: bool
    ) -> Tensor | None:
        if keep is None and self.training and has_labels:
            return None
        if isinstance(keep, Tensor):
            if keep.ndim != 1:
                raise ValueError(
                    "logits_to_keep must be an integer or indices of shape (positions,), got "
                    f"{tuple(keep.shape)}."
                )
            return self.lm_head(features[:, keep])
        return self.lm_head(features[:, -(keep or 0) :])

    def _prepare_cache_for_generation(self, *args: Any, **options: Any) -> Any:
        """Gives `generate` our cache, where Transformers would make one of all keys."""
        generation_config, model_kwargs = args[:2]
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongNetCache()
        mixin: Any = super()
        return mixin._prepare_cache_for_generation(*args, **options)


class LongNetForMaskedLM(LongNetWithHead):
    """Masked language model: `LongNetMLM` with Transformers' conventions.

    In training no logits exist; the loss is made at labelled positions alone.

    Args:
        config: The options, with `is_causal=False`.

    Raises:
        ValueError: If the config is of a causal model.

    Example:
        >>> config = LongNetConfig(vocab_size=259, num_layers=2, is_causal=False)
        >>> logits = LongNetForMaskedLM(config)(torch.randint(259, (1, 4096))).logits
    """

    needs_causal = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Computes logits, or in training with labels the loss alone.

        Args:
            input_ids: As for `LongNetModel`, like all arguments that are not in this list.
            attention_mask: As for `LongNetModel`.
            inputs_embeds: As for `LongNetModel`.
            labels: The original tokens at masked positions, -100 elsewhere, int64 (batch, seq_len).
            output_attentions: As for `LongNetModel`.
            output_hidden_states: As for `LongNetModel`.
            return_dict: As for `LongNetModel`.
            num_items_in_batch: What the sum of the losses is divided by; None: the labels here.

        Returns:
            `loss` (float32), `logits`, (batch, seq_len, vocab_size), and what was asked for.

        Raises:
            ValueError: If shapes, token ids or options do not fit.
            NotImplementedError: As for `LongNetModel`.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        features, loss = outputs.last_hidden_state, None
        if labels is not None:
            loss = self.head_loss(features, labels, num_items_in_batch)
        output = MaskedLMOutput(
            loss=loss,
            logits=None if self.training and loss is not None else self.lm_head(features),
            hidden_states=outputs.hidden_states,
        )
        return output if choose(return_dict, self.config.return_dict) else output.to_tuple()


AutoConfig.register(LongNetConfig.model_type, LongNetConfig)
AutoModel.register(LongNetConfig, LongNetModel)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM)
AutoModelForMaskedLM.register(LongNetConfig, LongNetForMaskedLM)
