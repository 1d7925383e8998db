"""What the text models share: token embedding, stack, output head and loss.

Shape legend: b batch, n seq_len, e embed_dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional

from longnet_zoo.layers import initialize_weights
from longnet_zoo.ops.cross_entropy import Reduction, linear_cross_entropy
from longnet_zoo.ops.streaming import StreamingCache

from .base import ZooModel, make_stack
from .checks import check_tokens
from .heads import fit_module
from .streaming import check_cache, run_stream
from .text_config import TextConfig

__all__ = ["TextModel"]


class TextModel(ZooModel):
    """Token embedding, Transformer stack and output head.

    Positions are implicit (0, 1, ...); any length from 1 token works. The output head is the
    token embedding, transposed, unless `tie_embeddings=False`: there is one such matrix then, under
    one key of the state dict.

    The loss is made by the attribute `cross_entropy_op`, with the signature of
    `linear_cross_entropy`: replace it where several processes have parts of a sequence.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.
    """

    config: TextConfig

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.embedding: nn.Embedding | None = None
        if config.vocab_size is not None:
            self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
            initialize_weights(self.embedding, gain=1.0)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = make_stack(
            config,
            position=config.position,
            rotary_base=config.rotary_base,
            xpos_scale_base=config.xpos_scale_base,
            relative_buckets=config.relative_buckets,
            relative_max_distance=config.relative_max_distance,
            extra_branches=config.extra_branches,
        )
        self.head = _make_head(config)
        self.cross_entropy_op = linear_cross_entropy

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: StreamingCache | None = None,
    ) -> Tensor:
        """Computes logits for every position.

        Args:
            tokens: Token ids, integers (batch, seq_len).
            inputs_embeds: Embeddings instead of tokens, (batch, seq_len, embed_dim).
            key_padding_mask: Bool (batch, seq_len), True = padding.
            cu_seqlens: Boundaries of packed sequences, int32 (num_sequences + 1,), for batch 1.
            cache: What was read before, of `make_cache`; the tokens follow it, and it then has read
                them too. With it padding must be on the right, and belongs to no sequence.

        Returns:
            Logits, (batch, seq_len, num_outputs); features for a model without a head.

        Raises:
            ValueError: If shapes or token ids do not fit the model.
            TypeError: If tokens are not integers.
        """
        features = self.forward_features(
            tokens,
            inputs_embeds=inputs_embeds,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            cache=cache,
        )
        return self.forward_head(features)

    def forward_features(
        self,
        tokens: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: StreamingCache | None = None,
    ) -> Tensor:
        """Computes features after the final norm, (batch, seq_len, embed_dim).

        Args:
            tokens: As for `forward`.
            inputs_embeds: As for `forward`.
            key_padding_mask: As for `forward`.
            cu_seqlens: As for `forward`.
            cache: As for `forward`.

        Returns:
            Features, (batch, seq_len, embed_dim).

        Raises:
            ValueError: If shapes or token ids do not fit the model.
            TypeError: If tokens are not integers.
        """
        x = self._embed(tokens, inputs_embeds)
        if cache is not None:
            check_cache(self, cache, x, cu_seqlens)
            return run_stream(self.stack, x, cache, key_padding_mask)
        return self.stack(x, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens)

    def forward_head(self, features: Tensor) -> Tensor:
        """Maps features (..., embed_dim) to logits (..., num_outputs)."""
        weight = self.head_weight
        return features if weight is None else functional.linear(features, weight)

    def loss(
        self,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        ignore_index: int = -100,
        chunk_size: int | None = None,
        reduction: Reduction = "mean",
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: StreamingCache | None = None,
    ) -> Tensor:
        """Computes the cross-entropy of the labels; logits exist for a chunk of rows at a time.

        Args:
            tokens: As for `forward`.
            labels: What each position must predict, int64 (batch, seq_len). Rows with
                `ignore_index` cost nothing beyond their features.
            inputs_embeds: As for `forward`.
            ignore_index: Label of positions without loss, such as padding.
            chunk_size: Rows whose logits exist at once; None: what fits a fixed memory.
            reduction: `"mean"` over the labelled positions (0 if there are none), `"sum"` or
                `"none"`.
            key_padding_mask: As for `forward`.
            cu_seqlens: As for `forward`.
            cache: As for `forward`.

        Returns:
            Loss in nats, float32: a scalar, or (batch, seq_len) for `"none"`.

        Raises:
            ValueError: If shapes, token ids or labels do not fit the model, or it has no head.
            TypeError: If tokens or labels are not integers, or labels are missing.
        """
        weight = self.head_weight
        if weight is None:
            raise ValueError(
                "loss needs an output head, this model has none (num_outputs=0). "
                "Call reset_classifier(vocab_size)."
            )
        if labels is None:
            raise TypeError("loss needs labels, int64 (batch, seq_len), got None.")
        features = self.forward_features(
            tokens,
            inputs_embeds=inputs_embeds,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            cache=cache,
        )
        return self.cross_entropy_op(
            features,
            weight,
            labels,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
            reduction=reduction,
        )

    @property
    def head_weight(self) -> Tensor | None:
        """The matrix that makes the logits, (num_outputs, embed_dim); None without a head."""
        classifier = self.get_classifier()
        return None if classifier is None else classifier.weight

    def get_classifier(self) -> nn.Linear | nn.Embedding | None:
        """Returns the module whose weight makes the logits: the embedding if they are tied."""
        return self.embedding if self.config.has_tied_head else self.head

    def reset_classifier(self, num_outputs: int) -> None:
        """Replaces the output head by a new one of its own, no longer tied to the embedding.

        Args:
            num_outputs: Logits per token; 0 removes the head, then `forward` returns features.

        Raises:
            ValueError: If `num_outputs` is negative.
            TypeError: If `num_outputs` is not an integer.
        """
        self.config = replace(self.config, num_outputs=num_outputs, tie_embeddings=False)
        head = _make_head(self.config)
        self.head = None if head is None else fit_module(head, self)

    def make_cache(self, batch_size: int = 1) -> StreamingCache:
        """Makes a cache with which the model reads sequences piece by piece.

        Args:
            batch_size: Sequences that are read side by side.

        Raises:
            ValueError: If the model is not causal, or `batch_size` is below 1.
            NotImplementedError: If the model has `extra_branches`.
        """
        if self.config.extra_branches:
            raise NotImplementedError(
                "a model with extra_branches keeps no cache, since any key may be seen again, got "
                f"extra_branches={self.config.extra_branches}. Run it on whole sequences. To write "
                "use longnet_zoo.interop.transformers.LongNetForCausalLM.from_zoo(model).generate("
                "..., use_cache=False), which reads all tokens again for each new one."
            )
        if not self.config.is_causal:
            raise ValueError(
                f"only a causal model reads piece by piece, got {type(self).__name__}, whose "
                "tokens see later ones. Use a longnet_lm_* model."
            )
        return StreamingCache(
            self.config.pattern, num_layers=self.config.num_layers, batch_size=batch_size
        )

    def flops(self, seq_len: int) -> int:
        """Counts the FLOPs of a forward pass over one sequence, head included; see `ZooModel`.

        Buckets of hashes are counted as if tokens filled them evenly; hashing is left out.

        Args:
            seq_len: Number of tokens.
        """
        head, config = self.head_weight, self.config
        pairs = sum(
            branch.for_layer(layer).attended_pairs(
                seq_len, config.num_heads, is_causal=config.is_causal
            )
            for branch in config.extra_branches
            for layer in range(config.num_layers)
        )
        branches = 4 * config.head_dim * pairs
        flops = super().flops(seq_len) + branches
        return flops + (0 if head is None else 2 * head.numel() * seq_len)

    def _embed(self, tokens: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (tokens is None) == (inputs_embeds is None):
            got = "neither" if tokens is None else "both"
            raise ValueError(f"give either tokens or inputs_embeds, got {got}.")
        if inputs_embeds is not None:
            self._check_embeds(inputs_embeds)
            x = inputs_embeds
        else:
            assert tokens is not None
            self._check_tokens(tokens)
            assert self.embedding is not None
            x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.embed_dim)
        return self.dropout(x)

    def _check_tokens(self, tokens: Tensor) -> None:
        if self.embedding is None:
            raise ValueError(
                "this model has no token embedding (vocab_size=None). Pass inputs_embeds."
            )
        # By the weight, since adapters put a module of their own in this place.
        check_tokens(tokens, vocab_size=self.embedding.weight.shape[0])

    def _check_embeds(self, inputs_embeds: Tensor) -> None:
        embed_dim = self.config.embed_dim
        shape = tuple(inputs_embeds.shape)
        if inputs_embeds.ndim != 3 or shape[2] != embed_dim or 0 in shape:
            raise ValueError(
                f"inputs_embeds must be (batch, seq_len, embed_dim) with embed_dim={embed_dim} and "
                f"at least one position, got {shape}."
            )


def _make_head(config: TextConfig) -> nn.Linear | None:
    if config.has_tied_head or config.head_size == 0:
        return None
    head = nn.Linear(config.embed_dim, config.head_size, bias=False)
    nn.init.normal_(head.weight, std=config.embed_dim**-0.5)
    return head
