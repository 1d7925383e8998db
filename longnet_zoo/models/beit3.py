"""BEiT-3 (arXiv 2208.10442): one multiway Transformer for images, texts and pairs of both.

An image becomes patches behind a class token, a text becomes tokens; image, then text, go through
one stack, where all tokens attend to each other and each modality has its own linear layers and
norms. With the default, dense pattern this is BEiT-3; with `segment_lengths` and `dilation_rates`
the same weights take long texts and large images. Facts from microsoft/torchscale,
`model/BEiT3.py`, and microsoft/unilm, `beit3/`.

Shape legend: b batch, p num_patches, t text_len, n seq_len, e embed_dim.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from longnet_zoo.ops.cross_entropy import linear_cross_entropy
from longnet_zoo.registry import register_model

from .beit3_caption import BEiT3Captioner
from .beit3_config import BEiT3Config, GlobalPool, published_weights
from .beit3_heads import make_classifier
from .beit3_inputs import check_first_tokens, check_labels, check_pairs, image_part, text_part
from .checks import check_mask
from .heads import fit_module

__all__ = [
    "BEiT3",
    "BEiT3Config",
    "longnet_beit3_base_patch16_224",
    "longnet_beit3_large_patch16_224",
    "longnet_beit3_tiny",
]


class BEiT3(BEiT3Captioner):
    """Multiway Transformer for images, texts and both (BEiT-3).

    The output has the tokens of the image first (class token, then patches row by row), then those
    of the text. Where only one of them is given, only its weights are used. What it can learn:

    - `forward`: classes of images, texts, or pairs such as an image and a question about it;
    - `masked_loss`: hidden patches and tokens;
    - `caption_loss`, and `generate`: texts about images;
    - `contrastive_loss`: which text belongs to which image.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.

    Example:
        >>> model = BEiT3(BEiT3Config(num_layers=2, num_classes=10))
        >>> image, tokens = torch.randn(1, 3, 224, 224), torch.randint(64010, (1, 20))
        >>> logits = model(image, tokens)  # (1, 10)
        >>> features = model.forward_features(tokens=tokens)  # (1, 20, 768)

        Questions about images, whose answers are 3 classes, with a dilated pattern:

        >>> pattern = {"segment_lengths": (32, 64), "dilation_rates": (1, 2)}
        >>> config = BEiT3Config(num_layers=2, vocab_size=256, num_classes=3, **pattern)
        >>> model, image = BEiT3(config), torch.randn(2, 3, 224, 224)
        >>> questions = [list(b"what is it?"), list(b"how many are there?")]
        >>> tokens = pad_sequence(list(map(torch.tensor, questions)), True)  # of torch.nn.utils.rnn
        >>> answers = model(image, tokens, text_padding_mask=tokens == 0).softmax(-1)  # (2, 3)
    """

    @property
    def num_classes(self) -> int:
        """Classes of the classification head; 0 without one."""
        return self.config.num_classes

    def forward(
        self,
        image: Tensor | None = None,
        tokens: Tensor | None = None,
        *,
        text_padding_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Classifies an image, a text, or a pair of both.

        Args:
            image: As for `forward_features`.
            tokens: As for `forward_features`.
            text_padding_mask: As for `forward_features`.
            image_mask: As for `forward_features`.

        Returns:
            Logits, (batch, num_classes); pooled features (batch, embed_dim) for a model without a
            classification head.

        Raises:
            ValueError: As `forward_features`; without an image also for `global_pool="avg"` or
                padding at a first token.
            TypeError: As `forward_features`.
        """
        features = self.forward_features(
            image, tokens, text_padding_mask=text_padding_mask, image_mask=image_mask
        )
        if image is None and self.config.global_pool == "avg":
            raise ValueError(
                "global_pool='avg' is the mean over the patches of an image, got image=None. "
                "Use forward_features, or global_pool='token'."
            )
        if image is None:
            check_first_tokens(text_padding_mask)
        return self.forward_head(features)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools features and classifies them.

        Args:
            features: Output of `forward_features`, (batch, seq_len, embed_dim); for
                `global_pool="avg"` that of an image, alone or with a text.
            pre_logits: Whether to leave out the layers that `get_classifier` returns.

        Returns:
            Logits (batch, num_classes), or features (batch, embed_dim) for `pre_logits` and for a
            model without a classification head.
        """
        is_avg = self.config.global_pool == "avg"
        pooled = image_part(self.config, features).mean(dim=1) if is_avg else features[:, 0]
        head = self.classifier
        return pooled if head is None else head(pooled, pre_logits=pre_logits)

    def masked_image_logits(self, features: Tensor, image_mask: Tensor) -> Tensor:
        """Computes the logits of the visual tokens at masked patches.

        Args:
            features: Output of `forward_features` for an image, alone or with a text.
            image_mask: Bool (batch, num_patches), True = masked.

        Returns:
            Logits, (num_masked, num_visual_tokens), row by row of the mask.

        Raises:
            ValueError: If the model has no such head, or shapes do not fit.
            TypeError: If the mask is not bool.
        """
        head, patches = self._training_head("masked_image"), image_part(self.config, features)
        check_mask("image_mask", image_mask, tuple(patches.shape[:2]))
        return head(patches[image_mask])

    def masked_text_logits(self, features: Tensor, text_mask: Tensor) -> Tensor:
        """Computes the logits of the vocabulary at masked tokens.

        Args:
            features: Output of `forward_features` for a text, alone or with an image.
            text_mask: Bool (batch, text_len), True = masked.

        Returns:
            Logits, (num_masked, vocab_size), row by row of the mask.

        Raises:
            ValueError: If the model has no such head, or shapes do not fit.
            TypeError: If the mask is not bool.
        """
        head = self._training_head("masked_text")
        check_mask("text_mask", text_mask, (features.shape[0], *text_mask.shape[1:2]))
        return head(text_part(self.config, features, text_mask.shape[1])[text_mask])

    def masked_loss(
        self,
        image: Tensor | None = None,
        tokens: Tensor | None = None,
        *,
        image_mask: Tensor | None = None,
        image_labels: Tensor | None = None,
        text_labels: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        ignore_index: int = -100,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Computes the loss of masked modelling; logits exist for a chunk of rows at a time.

        Args:
            image: As for `forward_features`.
            tokens: As for `forward_features`, with masked ones replaced by the caller.
            image_mask: As for `forward_features`.
            image_labels: Visual token of each patch, int64 (batch, num_patches); patches that are
                not masked have no loss.
            text_labels: What each token must be, int64 (batch, text_len); `ignore_index` for tokens
                that are not masked.
            text_padding_mask: As for `forward_features`; padding has no loss.
            ignore_index: Label of positions without loss.
            chunk_size: Rows whose logits exist at once; None: what fits a fixed memory.

        Returns:
            Mean over the masked patches plus mean over the labelled tokens, in nats, float32.

        Raises:
            ValueError: If there are no labels, labels come without what they label or in another
                shape, the model lacks a head, or as `forward_features`.
            TypeError: As `forward_features`.
        """
        if image_labels is None and text_labels is None:
            raise ValueError("masked_loss needs image_labels, text_labels or both, got neither.")
        check_labels("image_labels", image_labels, "image_mask", image_mask)
        check_labels("text_labels", text_labels, "tokens", tokens)
        features = self.forward_features(
            image, tokens, text_padding_mask=text_padding_mask, image_mask=image_mask
        )
        cross_entropy = partial(
            linear_cross_entropy, ignore_index=ignore_index, chunk_size=chunk_size
        )
        losses = []
        if image_labels is not None and image_mask is not None:
            head, x = self._training_head("masked_image"), image_part(self.config, features)
            labels = image_labels.masked_fill(~image_mask, ignore_index)
            losses.append(cross_entropy(x, head.weight, labels, bias=head.bias))
        if text_labels is not None:
            head, x = self._training_head("masked_text"), features[:, -text_labels.shape[1] :]
            if text_padding_mask is not None:
                text_labels = text_labels.masked_fill(text_padding_mask, ignore_index)
            losses.append(cross_entropy(x, head.weight, text_labels, bias=head.bias))
        return torch.stack(losses).sum()

    def encode_image(self, image: Tensor) -> Tensor:
        """Embeds images for retrieval: (b, in_chans, img_size, img_size) to length 1, (b, e)."""
        head = self._training_head("retrieval")
        return head.embed_image(self.forward_features(image)[:, 0])

    def encode_text(self, tokens: Tensor, *, text_padding_mask: Tensor | None = None) -> Tensor:
        """Embeds texts for retrieval: (b, t), padded where bool (b, t), to length 1, (b, e)."""
        head = self._training_head("retrieval")
        features = self.forward_features(tokens=tokens, text_padding_mask=text_padding_mask)
        check_first_tokens(text_padding_mask)
        return head.embed_text(features[:, 0])

    def contrastive_loss(
        self, image: Tensor, tokens: Tensor, *, text_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Computes the contrastive loss of a batch of pairs, on this process alone: a scalar."""
        check_pairs(image, tokens)
        text = self.encode_text(tokens, text_padding_mask=text_padding_mask)
        return self._training_head("retrieval").loss(self.encode_image(image), text)

    def get_classifier(self) -> nn.Module | None:
        """Returns the layers that `pre_logits` leaves out; None without a classification head."""
        return None if self.classifier is None else self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replaces the classification head, its pooling layers included, by a new one.

        Args:
            num_classes: Number of classes; 0 removes the head.
            global_pool: "token" or "avg"; None: as before.

        Raises:
            ValueError: If `num_classes` is negative or `global_pool` unknown.
            TypeError: If `num_classes` is not an integer.
        """
        global_pool = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=global_pool)
        new = make_classifier(self.config)
        self.classifier = None if new is None else fit_module(new, self)


_register = partial(register_model, family="longnet_beit3", modality="vision-language")


@_register(
    "longnet_beit3_tiny",
    config=BEiT3Config(
        img_size=64,
        patch_size=8,
        vocab_size=259,
        max_text_len=254,
        num_visual_tokens=256,
        embed_dim=128,
        num_layers=4,
        num_heads=4,
    ),
    description="images and bytes, for laptops",
    source="this project",
)
def longnet_beit3_tiny(config: BEiT3Config) -> BEiT3:
    """Builds a model of 1.7M parameters over small images and bytes."""
    return BEiT3(config)


@_register(
    "longnet_beit3_base_patch16_224",
    config=BEiT3Config(),
    description="BEiT-3 base: images, texts and pairs",
    source="arXiv 2208.10442; microsoft/unilm, beit3/modeling_utils.py",
    weights=published_weights("base"),
)
def longnet_beit3_base_patch16_224(config: BEiT3Config) -> BEiT3:
    """Builds the published base model, 221M parameters."""
    return BEiT3(config)


@_register(
    "longnet_beit3_large_patch16_224",
    config=BEiT3Config(embed_dim=1024, num_layers=24, num_heads=16),
    description="BEiT-3 large: images, texts and pairs",
    source="arXiv 2208.10442; microsoft/unilm, beit3/modeling_utils.py",
    weights=published_weights("large"),
)
def longnet_beit3_large_patch16_224(config: BEiT3Config) -> BEiT3:
    """Builds the published large model, 673M parameters."""
    return BEiT3(config)
