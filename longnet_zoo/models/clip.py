"""Images and texts in one space, by two towers: CLIP (arXiv 2103.00020) for long texts.

The image tower is LongViT, the text tower a bidirectional LongNet with rotary positions, so that a
text may have thousands of tokens where CLIP's has 77. Both are pooled by the mean of their tokens:
every token reaches it directly, while an end token would see a long text through few dilated keys.
A linear map without bias leads to the common space. The loss is that of CLIP, softmax over both
directions, or that of SigLIP (arXiv 2303.15343), a sigmoid for each pair.

Shape legend: b batch, n tokens of a text, d output_dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.ops.arguments import can_read
from longnet_zoo.ops.contrastive import contrastive_loss
from longnet_zoo.registry import register_model

from .base import ZooModel
from .checks import check_tokens
from .clip_config import LongNetCLIPConfig
from .heads import masked_mean
from .longvit import LongViT
from .longvit_config import LongViTConfig
from .text_encoder import LongNetMLM, LongNetMLMConfig

__all__ = ["LongNetCLIP", "LongNetCLIPConfig", "longnet_clip_base", "longnet_clip_tiny"]

# Initial scale and bias: CLIP, Sec. 2.5; SigLIP, Sec. 3.2. Largest scale: CLIP, Sec. 2.5.
_SOFTMAX_SCALE = 1 / 0.07
_SIGMOID_SCALE, _SIGMOID_BIAS = 10.0, -10.0
_MAX_LOG_SCALE = math.log(100.0)


class LongNetCLIP(ZooModel):
    """Image tower `visual` and text tower `text`, compared by the cosine of their features.

    Method names are those of open_clip. The scale of the logits never exceeds 100: each call in
    training mode first sets the parameter back to that, so that no training loop has to.

    The loss is made by the attribute `contrastive_loss_op`, with the signature of
    `longnet_zoo.ops.contrastive.contrastive_loss`: replace it by a `ParallelContrastiveLoss` where
    several processes have pairs. `longnet_zoo.parallelize` takes the towers one by one.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.

    Example:
        >>> model = longnet_zoo.create_model("longnet_clip_tiny")
        >>> tokens = longnet_zoo.get_tokenizer("longnet_clip_tiny")(["a cat", "a dog"])
        >>> loss = model.contrastive_loss(torch.randn(2, 3, 64, 64), tokens)
    """

    config_class = LongNetCLIPConfig
    config: LongNetCLIPConfig

    def __init__(self, config: LongNetCLIPConfig) -> None:
        super().__init__(config)
        self.visual = LongViT(config.image)
        self.text = LongNetMLM(config.text)
        self.image_projection = _make_projection(config.image.embed_dim, config.output_dim)
        self.text_projection = _make_projection(config.text.embed_dim, config.output_dim)
        is_sigmoid = config.loss == "sigmoid"
        scale = _SIGMOID_SCALE if is_sigmoid else _SOFTMAX_SCALE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(_SIGMOID_BIAS)) if is_sigmoid else None
        self.contrastive_loss_op = contrastive_loss

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Computes the features of images.

        Args:
            image: Normalised images, (batch, in_chans, height, width), of whole patches.
            normalize: Whether features have length 1.

        Returns:
            Features, (batch, output_dim).

        Raises:
            ValueError: If the images have other channels or no whole patches.
            TypeError: If they are not of a floating dtype.
        """
        features = self.image_projection(self.visual(image))
        return _unit(features).to(features.dtype) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Computes the features of texts; how far they are padded does not matter.

        Args:
            tokens: Token ids, integers (batch, seq_len), filled up with `pad_id` at the right.
            normalize: Whether features have length 1.

        Returns:
            Features, (batch, output_dim).

        Raises:
            ValueError: If shapes or token ids do not fit the model, or texts are too long or begin
                with padding.
            TypeError: If tokens are not integers.
        """
        self._check_tokens(tokens)
        # Attention runs at once over texts of one length that follow each other.
        order = (tokens == self.config.pad_id).sum(dim=1).argsort()
        tokens = tokens[order]
        padding = tokens == self.config.pad_id
        states = self.text.forward_features(tokens, key_padding_mask=padding)
        means = masked_mean(states, padding)[order.argsort()]
        features = self.text_projection(means)
        return _unit(features).to(features.dtype) if normalize else features

    def forward(
        self, image: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Computes normalised features of images and texts, and what makes logits of them.

        Args:
            image: As for `encode_image`; None: no image features.
            tokens: As for `encode_text`; None: no text features.

        Returns:
            Image features and text features, (batch, output_dim) or None; the scale of their
            products, a scalar; and for `loss="sigmoid"` the bias.

        Raises:
            ValueError: As for `encode_image` and `encode_text`.
            TypeError: Likewise.
        """
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if tokens is None else self.encode_text(tokens, normalize=True)
        bias = () if self.logit_bias is None else (self.logit_bias,)
        return image_features, text_features, self.scale(), *bias

    def contrastive_loss(
        self,
        image: Tensor,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Computes the loss of a batch in which image i and text i are a pair.

        Args:
            image: As for `encode_image`.
            tokens: As for `encode_text`, as many as images.
            labels: Which pairs belong together, int64 (batch,), for images or texts that occur
                twice: equal labels are pairs. None: each only to itself.
            chunk_size: Rows of logits that exist at once; None: all.

        Returns:
            The loss in nats, a scalar.

        Raises:
            ValueError: If shapes do not fit, or as for `encode_image` and `encode_text`.
            TypeError: Likewise.
        """
        return self.contrastive_loss_op(
            _unit(self.encode_image(image)),
            _unit(self.encode_text(tokens)),
            self.scale(),
            bias=self.logit_bias,
            kind=self.config.loss,
            labels=labels,
            chunk_size=chunk_size,
        )

    def scale(self) -> Tensor:
        """What cosines are multiplied with, a scalar of at most 100."""
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(max=_MAX_LOG_SCALE)
            return self.logit_scale.exp()
        return self.logit_scale.clamp(max=_MAX_LOG_SCALE).exp()

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Changes the image and patch size of the image tower; see `LongViT.set_input_size`.

        Args:
            img_size: Pixels, one number or (height, width); None: as it is.
            patch_size: Side of a patch in pixels; None: as it is.

        Raises:
            ValueError: If the image is not made of whole patches.
        """
        self.visual.set_input_size(img_size, patch_size)
        self.config = replace(self.config, image=self.visual.config)

    def no_weight_decay(self) -> set[str]:
        """Names the parameters for which weight decay makes no sense: norms, biases, positions."""
        towers = {"visual": self.visual, "text": self.text}
        found = {f"{name}.{x}" for name, tower in towers.items() for x in tower.no_weight_decay()}
        return super().no_weight_decay() | found

    def flops(self, seq_len: int) -> int:
        """Counts the FLOPs for a pair: an image of the usual size and a text; see `ZooModel`.

        Args:
            seq_len: Number of tokens of the text.
        """
        projections = self.image_projection.weight.numel() + self.text_projection.weight.numel()
        image = self.visual.flops(self.config.image.usual_seq_len)
        return image + self.text.flops(seq_len) + 2 * projections

    def _check_tokens(self, tokens: Tensor) -> None:
        assert self.config.text.vocab_size is not None
        check_tokens(tokens, vocab_size=self.config.text.vocab_size)
        if tokens.shape[1] > self.config.max_text_len:
            raise ValueError(
                f"texts must have at most max_text_len={self.config.max_text_len} tokens, got "
                f"{tokens.shape[1]}. Cut them, or make the model with a larger max_text_len."
            )
        first = tokens[:, 0] == self.config.pad_id
        # Reading values would stall a GPU.
        if tokens.device.type == "cpu" and can_read(first) and first.any():
            raise ValueError(
                "texts must begin with a token and be filled up at the right, got "
                f"pad_id={self.config.pad_id} first in rows {first.nonzero().flatten().tolist()}. "
                "Pad on the right, and give an empty text its end token."
            )


def _unit(features: Tensor) -> Tensor:
    """Scales features to length 1, in at least float32."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return functional.normalize(features.to(dtype), dim=-1)


def _make_projection(in_features: int, out_features: int) -> nn.Linear:
    projection = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(projection.weight, std=in_features**-0.5)
    return projection


_register = partial(
    register_model, family="longnet_clip", modality="image-text", source="this project"
)


@_register(
    "longnet_clip_tiny",
    config=LongNetCLIPConfig(
        image=LongViTConfig(
            img_size=64,
            patch_size=8,
            embed_dim=128,
            num_layers=6,
            num_heads=4,
            segment_lengths=(16, 32, 64),
            dilation_rates=(1, 2, 4),
            final_norm=True,
        ),
        text=LongNetMLMConfig(
            vocab_size=259,
            embed_dim=128,
            num_layers=4,
            num_heads=4,
            segment_lengths=(512, 1024, 2048, 4096, 8192),
            dilation_rates=(1, 2, 4, 8, 16),
            num_outputs=0,
        ),
        output_dim=128,
    ),
    description="images of 64 px and texts of 8,192 bytes, for laptops",
)
def longnet_clip_tiny(config: LongNetCLIPConfig) -> LongNetCLIP:
    """Builds a model of 2M parameters over bytes."""
    return LongNetCLIP(config)


@_register(
    "longnet_clip_base",
    config=LongNetCLIPConfig(
        image=LongViTConfig(
            img_size=1024,
            patch_size=16,
            embed_dim=768,
            num_layers=12,
            num_heads=12,
            segment_lengths=(512, 1024, 2048, 4096),
            dilation_rates=(1, 2, 4, 8),
            final_norm=True,
        ),
        text=LongNetMLMConfig(
            vocab_size=259,
            embed_dim=512,
            num_layers=12,
            num_heads=8,
            segment_lengths=(1024, 2048, 4096, 8192),
            dilation_rates=(1, 2, 4, 8),
            num_outputs=0,
        ),
        output_dim=512,
    ),
    description="images of 1,024 px and texts of 8,192 bytes",
)
def longnet_clip_base(config: LongNetCLIPConfig) -> LongNetCLIP:
    """Builds two towers of the sizes of CLIP ViT-B/16, for long inputs."""
    return LongNetCLIP(config)
