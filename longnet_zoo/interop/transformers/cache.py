"""What `generate` keeps between tokens, in the form that Transformers hands around."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from longnet_zoo.models import TextModel
from longnet_zoo.ops.streaming import StreamingCache

__all__ = ["LongNetCache"]


class LongNetCache(Cache):
    """Keys and values of a `LongNetForCausalLM`: those that later tokens can still reach.

    Its memory does not grow with the tokens read: see `longnet_zoo.StreamingCache`. It keeps no
    past to go back to, so `crop` cannot forget tokens and assisted generation is refused.

    Example:
        >>> cache = LongNetCache()
        >>> for chunk in input_ids.split(4096, dim=1):
        ...     outputs = model(chunk, past_key_values=cache)
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._kept: StreamingCache | None = None
        self._num_columns = 0

    def read(
        self,
        network: TextModel,
        *,
        tokens: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Reads the tokens that follow those read before.

        Args:
            network: The model, always the same one.
            tokens: Token ids, (batch, seq_len), the real ones of each row in front.
            inputs_embeds: Embeddings instead, (batch, seq_len, embed_dim).
            key_padding_mask: Bool (batch, seq_len), True = padding.

        Returns:
            Features, (batch, seq_len, embed_dim).

        Raises:
            ValueError: If the batch is not that of the tokens before.
        """
        given = tokens if inputs_embeds is None else inputs_embeds
        assert given is not None
        if self._kept is None:
            self._kept = network.make_cache(len(given))
        if len(given) != self._kept.batch_size:
            raise ValueError(
                f"a cache goes on with its own rows, got a batch of {len(given)} for a cache of "
                f"{self._kept.batch_size}. Use batch_repeat_interleave, or a new LongNetCache()."
            )
        features = network.forward_features(
            tokens,
            inputs_embeds=inputs_embeds,
            cache=self._kept,
            key_padding_mask=key_padding_mask,
        )
        self._num_columns += given.shape[1]
        return features

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Counts the columns of `input_ids` that have been read, padding included."""
        return self._num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no longest sequence."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes these rows as the new batch; beam search calls it."""
        if self._kept is not None:
            self._kept.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row, as several answers to one prompt need it."""
        if self._kept is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows alone."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forgets what was read."""
        self._kept, self._num_columns = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to forget the last tokens: what they pushed out is gone.

        Raises:
            NotImplementedError: If there is a token to forget.
        """
        if tokens_to_remove:
            raise NotImplementedError(
                "a LongNetCache cannot go back, got crop("
                f"{tokens_to_remove}). Copy it before with copy.deepcopy."
            )

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first tokens."""
        return -1 if self._kept is None else self._kept.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have been read."""
        return self._kept is not None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works: False."""
        return False

    def __repr__(self) -> str:
        return f"LongNetCache(batch_size={self.batch_size}, seq_length={self._num_columns})"
