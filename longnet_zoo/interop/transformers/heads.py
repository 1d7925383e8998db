"""What a model with an output head has in common with the others: the head and its loss.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.models import TextModel
from longnet_zoo.ops.cross_entropy import Reduction

from .backbone import LongNetModel
from .base import LongNetPreTrainedModel
from .config import LongNetConfig

__all__ = ["LongNetWithHead"]


class LongNetWithHead(LongNetPreTrainedModel):
    """A `LongNetModel` with logits of every token.

    Args:
        config: The options.

    Attributes:
        needs_causal: What `is_causal` must be.

    Raises:
        ValueError: If the config is of a model of the other direction.
    """

    needs_causal: ClassVar[bool]

    _tied_weights_keys = {"lm_head.weight": "model.network.embedding.weight"}  # noqa: RUF012
    # Trainer then counts the labels of all batches that make one step.
    accepts_loss_kwargs = True

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        if config.is_causal is not self.needs_causal:
            other = "LongNetForMaskedLM" if self.needs_causal else "LongNetForCausalLM"
            raise ValueError(
                f"{type(self).__name__} needs is_causal={self.needs_causal}, got a config with "
                f"is_causal={config.is_causal}. Use {other}, or "
                f"LongNetConfig(is_causal={self.needs_causal})."
            )
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def head_loss(
        self, features: Tensor, labels: Tensor, num_items: Tensor | int | None = None
    ) -> Tensor:
        """Computes the cross-entropy of the head; logits exist for a chunk of rows at a time.

        Args:
            features: Outputs of the stack, (batch, seq_len, embed_dim).
            labels: What each position must predict, (batch, seq_len); -100: nothing.
            num_items: What the sum is divided by; None: the number of labels.

        Returns:
            Loss in nats, a float32 scalar.

        Raises:
            ValueError: If labels have another shape than the tokens.
        """
        if labels.shape != features.shape[:2]:
            raise ValueError(
                f"labels must be (batch, seq_len) = {tuple(features.shape[:2])}, got "
                f"{tuple(labels.shape)}."
            )
        labels = labels.to(features.device, torch.int64)
        reduction: Reduction = "mean" if num_items is None else "sum"
        # Adapters and offloading put another layer here, whose weight is not the whole truth.
        if type(self.lm_head) is nn.Linear and not hasattr(self.lm_head, "_hf_hook"):
            chunked = self._network.cross_entropy_op
            loss = chunked(features, self.lm_head.weight, labels, reduction=reduction)
        else:
            logits = self.lm_head(features).float().flatten(0, 1)
            loss = functional.cross_entropy(logits, labels.flatten(), reduction=reduction)
        return loss if num_items is None else loss / num_items

    def _take_head(self, model: TextModel, weight: Tensor | None) -> None:
        size = model.config.head_size
        if size != self.config.vocab_size:
            raise ValueError(
                f"{type(self).__name__} needs a model with vocab_size={self.config.vocab_size} "
                f"logits, got one with {size}. Call reset_classifier, or use LongNetModel."
            )
        if weight is not None:
            self.lm_head.load_state_dict({"weight": weight}, assign=True)
        self.tie_weights()
