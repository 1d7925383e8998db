"""What our models have in common as `PreTrainedModel`s: initial values and conversion.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longnet_zoo.layers import (
    MemorySaving,
    TransformerBlock,
    TransformerStack,
    initialize_weights,
    residual_gain,
)
from longnet_zoo.models import LongNetLM, LongNetLMConfig, LongNetMLM, LongNetMLMConfig, TextModel

from .config import LongNetConfig

__all__ = ["LongNetPreTrainedModel", "blocks_of", "choose", "make_network", "recorded_states"]

ModelT = TypeVar("ModelT", bound="LongNetPreTrainedModel")


class LongNetPreTrainedModel(PreTrainedModel):
    """Base of `LongNetModel` and its heads.

    Args:
        config: The options.
    """

    config_class = LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # The cache cannot go back, which assisted generation would need.
    _is_stateful = True
    # It would replace an attention that is not ours.
    _supports_context_parallel = False

    @classmethod
    def from_zoo(cls: type[ModelT], model: TextModel, **options: Any) -> ModelT:
        """Makes the same model from one of ours, with a copy of its weights.

        Args:
            model: A `LongNetLM` or `LongNetMLM`, such as `longnet_zoo.create_model` makes.
            **options: Options of `LongNetConfig` that our models do not have, such as
                `eos_token_id`.

        Returns:
            The model, with the dtype, device and mode (training or not) of the given one.

        Raises:
            TypeError: If it is a model of another family.
            ValueError: If the model has no head, or one of another size, and this class needs one.

        Example:
            >>> model = LongNetForCausalLM.from_zoo(longnet_zoo.create_model("longnet_lm_tiny"))
        """
        if not isinstance(model, (LongNetLM, LongNetMLM)):
            raise TypeError(f"model must be a LongNetLM or LongNetMLM, got {type(model).__name__}.")
        with torch.device("meta"):  # memory for the weights comes with their copies
            made = cls(LongNetConfig.from_zoo(model.config, **options))
        weights = _copies(model)
        head = weights.pop("head.weight", None)
        made._network.load_state_dict(weights, assign=True)
        made._take_head(model, head)
        return made.train(model.training)

    def to_zoo(self) -> TextModel:
        """Makes the same model of ours, with a copy of the weights.

        Returns:
            A `LongNetLM`, or a `LongNetMLM` with `is_causal=False`; without head from a
            `LongNetModel`. It has the dtype, device and mode (training or not) of this one.
        """
        lm_head = getattr(self, "lm_head", None)
        with torch.device("meta"):
            made = make_network(self.config.to_zoo(num_outputs=0 if lm_head is None else None))
        weights = _copies(self._network)
        if made.head is not None and lm_head is not None:
            weights["head.weight"] = lm_head.weight.detach().clone()
        made.load_state_dict(weights, assign=True)
        return made.train(self.training)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Lets blocks be computed again in the backward pass; gradients stay what they are.

        Args:
            activation_checkpointing_kwargs: `{"use_reentrant": False}` or nothing.
            every_n_layers: Only the first of so many blocks is computed again.
            offload: Whether what is kept waits in the memory of the CPU.

        Raises:
            ValueError: If there are other options.
        """
        options = activation_checkpointing_kwargs or {}
        if options not in ({}, {"use_reentrant": False}):
            raise ValueError(
                "activation checkpointing of LongNet is not reentrant and has no other options, "
                f"got {options}. Pass {{'use_reentrant': False}} or nothing."
            )
        stack = self._network.stack
        stack.set_memory_saving(MemorySaving(chunk_size=None, offload=offload))
        for number, block in enumerate(blocks_of(stack)):
            if number % every_n_layers:
                block.memory_saving = None

    def activation_checkpointing_disable(self) -> None:
        """Lets every block keep what its backward pass needs, which is fastest."""
        self._network.set_grad_checkpointing(False)

    @property
    def _network(self) -> TextModel:
        return cast(TextModel, self.base_model.network)

    def _take_head(self, model: TextModel, weight: Tensor | None) -> None:
        """Takes the head of one of our models, for classes that have one."""

    def _init_weights(self, module: nn.Module) -> None:
        """Sets a module that no checkpoint has filled to the initial values of our models.

        Transformers calls it for every module by itself, also after construction: gains of sub-LN
        go by the name of a layer, so the name is looked up.
        """
        if next(module.parameters(recurse=False), None) is None:
            return
        name = next((name for name, child in self.named_modules() if child is module), "")
        parent, _, role = name.rpartition(".")
        if parent.endswith("stack.position_bias"):
            module, role = self.get_submodule(parent), "position_bias"
        if "stack." in name:
            initialize_weights(nn.ModuleDict({role: module}), gain=self._gain())
        else:  # token embedding and head, and those that resize_token_embeddings makes
            nn.init.normal_(cast(Tensor, module.weight), std=self.config.embed_dim**-0.5)

    def _gain(self) -> float:
        """Returns the gain of the residual path."""
        config = self.config
        if config.is_causal:
            return residual_gain(config.norm, part="decoder", num_decoder_layers=config.num_layers)
        return residual_gain(config.norm, part="encoder", num_encoder_layers=config.num_layers)


def make_network(config: LongNetLMConfig | LongNetMLMConfig) -> TextModel:
    """Makes the model of ours that a config describes."""
    return LongNetLM(config) if isinstance(config, LongNetLMConfig) else LongNetMLM(config)


def choose(given: bool | None, default: bool | None) -> bool:
    """Returns an option of a call, or the one of the config where there is none."""
    return bool(default if given is None else given)


@contextmanager
def recorded_states(stack: TransformerStack, *, enable: bool) -> Iterator[list[Tensor]]:
    """Records what goes into the first block and what comes out of each.

    Args:
        stack: The blocks.
        enable: Whether to record anything.

    Yields:
        The states, (batch, seq_len, embed_dim), a list that fills as the stack runs.
    """
    states: list[Tensor] = []
    handles = []
    if enable:
        first, *_ = blocks = blocks_of(stack)
        handles = [first.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))]
        handles += [
            block.register_forward_hook(lambda _, inputs, output: states.append(output))
            for block in blocks
        ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(stack: TransformerStack) -> list[TransformerBlock]:
    """Lists the blocks, also inside of wrappers."""
    return [module for module in stack.blocks.modules() if isinstance(module, TransformerBlock)]


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}
