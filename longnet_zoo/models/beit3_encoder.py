"""What all tasks of BEiT-3 share: embeddings, multiway layers, and the weights of the heads.

Shape legend: b batch, p num_patches, t text_len, n seq_len, e embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.layers import Route

from .base import ZooModel, make_stack
from .beit3_config import BEiT3Config, TrainingHead
from .beit3_heads import RetrievalHead, make_classifier, make_linear
from .beit3_inputs import ImageEmbedding, TextEmbedding, check_inputs

__all__ = ["BEiT3Encoder"]


class BEiT3Encoder(ZooModel):
    """Embeds images, texts and pairs, and runs them through multiway layers.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.
    """

    config_class = BEiT3Config
    config: BEiT3Config

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__(config)
        self.embed_dim = self.num_features = embed_dim = config.embed_dim
        self.image_embed = ImageEmbedding(config)
        self.text_embed = None if config.vocab_size is None else TextEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        options = {"num_modalities": config.num_modalities, "final_norm": config.final_norm}
        self.stack = make_stack(config, position=None, **options)
        self.masked_image_head: nn.Linear | None = None
        if "masked_image" in config.heads:
            self.masked_image_head = make_linear(embed_dim, config.num_visual_tokens)
        self.masked_text_head: nn.Linear | None = None
        if "masked_text" in config.heads and config.vocab_size is not None:
            self.masked_text_head = make_linear(embed_dim, config.vocab_size)
        self.retrieval_head: RetrievalHead | None = None
        if "retrieval" in config.heads:
            self.retrieval_head = RetrievalHead(embed_dim=embed_dim)
        self.classifier = make_classifier(config)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's `resolve_data_config` reads: images squeezed to a square, from -1 to 1.

        As in microsoft/unilm, `beit3/datasets.py`; published ImageNet classifiers have other means.
        """
        config = self.config
        return {
            "input_size": (config.in_chans, config.img_size, config.img_size),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": (0.5,) * config.in_chans,
            "std": (0.5,) * config.in_chans,
        }

    def forward_features(
        self,
        image: Tensor | None = None,
        tokens: Tensor | None = None,
        *,
        text_padding_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Computes features of all tokens, image then text; at least one of them must be given.

        Args:
            image: Images, (batch, in_chans, img_size, img_size).
            tokens: Token ids, integers (batch, text_len) with text_len up to `max_text_len`.
            text_padding_mask: Bool (batch, text_len), True = padding. No token attends to it, its
                own features mean nothing, and positions of others stay as they are.
            image_mask: Bool (batch, num_patches), True = hidden by the mask token.

        Returns:
            Features, (batch, seq_len, embed_dim), with seq_len = 1 + num_patches for an image plus
            text_len for a text.

        Raises:
            ValueError: If neither is given, shapes or token ids do not fit the model, or a mask
                comes without what it masks.
            TypeError: If images are not floating, tokens not integers or masks not bool.
        """
        x, options = self._embed(image, tokens, text_padding_mask, image_mask)
        return self.stack(x, **options)

    def _embed(
        self,
        image: Tensor | None,
        tokens: Tensor | None,
        text_padding_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        first: int = 0,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embeds what is given; returns what the stack takes, the text from token `first` on."""
        check_inputs(self.config, image, tokens, text_padding_mask, image_mask)
        parts, lengths, padding_mask = [], [0, 0], text_padding_mask
        if image is not None:
            parts.append(self.image_embed(image, image_mask))
            lengths[0] = 1 + self.config.num_patches
            if padding_mask is not None:
                padding_mask = functional.pad(padding_mask, (lengths[0], 0), value=False)
        if tokens is not None and self.text_embed is not None:
            parts.append(self.text_embed(tokens, text_padding_mask, first=first))
            lengths[1] = tokens.shape[1]
        x = self.dropout(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        route = None if self.text_embed is None else Route.split(*lengths)
        return x, {"key_padding_mask": padding_mask, "route": route}

    def no_weight_decay(self) -> set[str]:
        """Names the parameters for which weight decay makes no sense: norms, biases, positions."""
        kinds = ("cls_token", "mask_token", "positions.weight")
        positions = {name for name, _ in self.named_parameters() if name.endswith(kinds)}
        return super().no_weight_decay() | positions

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups parameters from the input to the output, for layer-wise learning rates.

        Args:
            coarse: Whether all blocks are one group.

        Returns:
            Patterns in the form that timm's `group_parameters` takes.
        """
        blocks = r"^stack\.blocks" if coarse else r"^stack\.blocks\.(\d+)"
        return {
            "stem": r"^(?:image|text)_embed",
            "blocks": [(blocks, None), (r"^stack\.norm", (99999,))],
        }

    def _training_head(self, name: TrainingHead) -> Any:
        head = getattr(self, f"{name}_head")
        if head is None:
            raise ValueError(
                f"this needs the head {name!r}, got a model with heads={self.config.heads}. "
                f"Create it with heads=({name!r},)."
            )
        return head
