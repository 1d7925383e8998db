"""Our text models without their heads, as a model of Hugging Face Transformers.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from .base import LongNetPreTrainedModel, blocks_of, choose, make_network, recorded_states
from .cache import LongNetCache
from .config import LongNetConfig
from .rows import order_rows

__all__ = ["LongNetModel"]


class LongNetModel(LongNetPreTrainedModel):
    """Embedding and stack of `LongNetLM`, or of `LongNetMLM` with `is_causal=False`.

    Args:
        config: The options.

    Example:
        >>> model = LongNetModel(LongNetConfig(vocab_size=259, num_layers=2))
        >>> features = model(torch.randint(259, (1, 4096))).last_hidden_state
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        zoo_config = config.to_zoo(num_outputs=0)
        self.network = make_network(zoo_config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Computes features after the final norm.

        Args:
            input_ids: Token ids, integers (batch, seq_len).
            attention_mask: 1 or True at real tokens, (batch, seq_len), or with a cache the mask of
                all tokens so far. Padding may be anywhere: positions count the real tokens.
            inputs_embeds: Embeddings instead of tokens, (batch, seq_len, embed_dim).
            past_key_values: What was read before; the tokens follow it.
            use_cache: Whether to return such a cache; None: if one is given. Causal models, in
                evaluation mode and without gradients.
            output_attentions: Must not be True: the matrices never exist.
            output_hidden_states: Whether to return the embeddings and the output of each block, the
                last one after the final norm.
            return_dict: Whether to return an output object, not a tuple.

        Returns:
            `last_hidden_state`, (batch, seq_len, embed_dim), and what was asked for.

        Raises:
            ValueError: If shapes, token ids or options do not fit.
            NotImplementedError: If attention matrices are asked for, or hidden states with a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"give either input_ids or inputs_embeds, got {got}.")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise NotImplementedError(
                "dilated attention never makes attention matrices, got output_attentions=True. "
                "Leave it out; longnet_zoo.ops.explain shows what a token attends to."
            )
        with_states = choose(output_hidden_states, self.config.output_hidden_states)
        cache = self._choose_cache(past_key_values, use_cache, with_states)
        states = self._run(input_ids, attention_mask, inputs_embeds, cache, with_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=tuple(states) if with_states else None,
        )
        return output if choose(return_dict, self.config.return_dict) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return cast(nn.Module, self.network.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding by another `nn.Embedding`."""
        embedding = cast(nn.Embedding, value)
        self.network.embedding = embedding
        self.network.config = self.network.config.changed({"vocab_size": embedding.num_embeddings})

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return any(block.memory_saving is not None for block in blocks_of(self.network.stack))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.network.set_grad_checkpointing(value)

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: LongNetCache | None,
        with_states: bool,
    ) -> list[Tensor]:
        """Runs the network on rows with their padding behind; returns its features last."""
        name, given = (
            ("tokens", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        )
        assert given is not None
        num_read = 0 if cache is None else cache.get_seq_length()
        order = order_rows(attention_mask, len(given), given.shape[1], num_read)
        inputs: dict[str, Any] = {name: given}
        if order is not None:
            inputs = {name: order.to_front(given), "key_padding_mask": order.key_padding_mask}
        read = self.network.forward_features if cache is None else partial(cache.read, self.network)
        with recorded_states(self.network.stack, enable=with_states) as states:
            features = read(**inputs)
        states = [*states[:-1], features]
        return states if order is None else [order.to_places(state) for state in states]

    def _choose_cache(
        self, given: LongNetCache | None, use_cache: bool | None, with_states: bool
    ) -> LongNetCache | None:
        if given is not None and not isinstance(given, LongNetCache):
            raise ValueError(
                f"past_key_values must be a LongNetCache, got {type(given).__name__}. Leave it "
                "out: use_cache=True makes one."
            )
        if use_cache is False and given is not None:
            raise ValueError("past_key_values needs use_cache=True or None, got use_cache=False.")
        if not use_cache and given is None:
            return None
        if not self.config.is_causal:
            raise ValueError(
                "a cache needs a causal model, got use_cache=True with is_causal=False: its tokens "
                "see later ones."
            )
        if with_states:
            raise NotImplementedError(
                "hidden states are not kept while a cache is in use, got "
                "output_hidden_states=True with a cache. Pass use_cache=False."
            )
        return LongNetCache() if given is None else given
