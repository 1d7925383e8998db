"""A slide encoder with a linear classifier on its embeddings of one or several layers.

Shapes: b slides, n tiles, d channels of a tile, e embed_dim, l layers, c classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SlideNetwork"]


class SlideNetwork(nn.Module):
    """Classifies slides by the embeddings of an encoder.

    Args:
        encoder: A `GigaPathSlideEncoder` without a head.
        num_classes: Number of classes.
        layers: Numbers of blocks after which the slide's embedding is taken, as in
            `GigaPathSlideEncoder.layer_embeddings`; several are concatenated. None takes what the
            encoder returns, behind its last LayerNorm. What comes after the last of them is not
            trained.
        freeze_encoder: Whether to train the classifier only; the encoder has no dropout then.

    Raises:
        ValueError: The encoder has a head, or no such layer.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        num_classes: int,
        layers: Sequence[int] | None = None,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        num_layers = encoder.config.num_layers
        if encoder.num_classes:
            raise ValueError(
                "the encoder must have no head, got one of num_classes="
                f"{encoder.num_classes}. Leave model_options.num_classes out."
            )
        if layers is not None and (
            not layers
            or min(layers) < 0
            or max(layers) > num_layers
            or len(set(layers)) < len(layers)
        ):
            raise ValueError(
                f"layers must be different numbers of blocks from 0 to num_layers={num_layers}, "
                f"got {list(layers)}. Pass null for the encoder's own embedding."
            )
        self.encoder = encoder
        self.layers = None if layers is None else tuple(layers)
        self.freeze_encoder = freeze_encoder
        self.head = nn.Linear(encoder.embed_dim * len(self.layers or [0]), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if freeze_encoder:
            encoder.requires_grad_(False)
        elif self.layers is not None:
            # Distributed training stops at parameters that get no gradient.
            encoder.stack.norm.requires_grad_(False)
            encoder.stack.blocks[max(self.layers) :].requires_grad_(False)

    @property
    def config(self) -> Any:
        """Config of the encoder."""
        return self.encoder.config

    def embed(self, tiles: Tensor, coords: Tensor, padding_mask: Tensor) -> Tensor:
        """Returns what the classifier sees of slides.

        Args:
            tiles: Embeddings of the tiles, (b, n, d).
            coords: Their coordinates, (b, n, 2).
            padding_mask: True = padding, (b, n).

        Returns:
            Embeddings of the slides, (b, l * e).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            if self.layers is None:
                return self.encoder(tiles, coords, padding_mask)
            embeddings = self.encoder.layer_embeddings(
                tiles, coords, padding_mask, layers=self.layers
            )
            return embeddings.flatten(1)

    def forward(self, tiles: Tensor, coords: Tensor, padding_mask: Tensor) -> Tensor:
        """Returns the scores of the classes, (b, c); arguments as for `embed`."""
        return self.head(self.embed(tiles, coords, padding_mask))

    def train(self, mode: bool = True) -> "SlideNetwork":
        """Chooses training or evaluation; a frozen encoder always evaluates."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def num_params(self) -> int:
        """Counts the parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def no_weight_decay(self) -> set[str]:
        """Names the parameters of the encoder that get no weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Gives timm the groups of parameters for layer decay: stem, blocks, head.

        Args:
            coarse: Whether all blocks make one group.
        """
        groups = self.encoder.group_matcher(coarse)
        blocks = [(_inside(pattern), place) for pattern, place in groups["blocks"]]
        return {"stem": _inside(groups["stem"]), "blocks": blocks}


def _inside(pattern: str) -> str:
    return pattern.replace("^", r"^encoder\.")
