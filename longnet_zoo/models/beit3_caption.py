"""Captions by BEiT-3: the image in front, seen whole, and a text that sees no later token.

A text begins and ends with the same token, as in GPT-2: `end_id`. Position i predicts token i + 1
of the text, by the head of masked text.

Shape legend: b batch, p num_patches, t text_len, e embed_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longnet_zoo.ops.cross_entropy import linear_cross_entropy
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.prefix_attention import attend_last_rows, prefix_attention
from longnet_zoo.ops.sampling import Sampling, draw_tokens

from .beit3_encoder import BEiT3Encoder
from .checks import check_mask, check_on_the_right, check_tokens, prompt_lengths

__all__ = ["BEiT3Captioner"]

_NO_LOSS = -100


class BEiT3Captioner(BEiT3Encoder):
    """Writes texts about images, and learns to.

    Patches see all patches and no text; a token sees the whole image and the text up to itself, as
    far as the dilated pattern reaches, whose segments go on from the image into the text.

    Args:
        config: The options, with the head "masked_text".
    """

    def caption_logits(
        self, image: Tensor, tokens: Tensor, *, text_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Computes the logits of the token that follows each one.

        Args:
            image: Images, (batch, in_chans, img_size, img_size).
            tokens: Token ids, integers (batch, text_len).
            text_padding_mask: Bool (batch, text_len), True = padding, on the right. No token sees
                what comes behind it, so this only says which logits mean nothing.

        Returns:
            Logits, (batch, text_len, vocab_size).

        Raises:
            ValueError: As `forward_features`; or padding is not on the right, the model has no head
                "masked_text", or pads segments with zero keys.
            TypeError: As `forward_features`.
            NotImplementedError: If the model is parallelized over sequences.
        """
        head = self._training_head("masked_text")
        return head(self._caption_features(image, tokens, text_padding_mask))

    def caption_loss(
        self,
        image: Tensor,
        tokens: Tensor,
        *,
        text_padding_mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Computes the loss of texts about images; logits exist for a chunk of rows at a time.

        Args:
            image: As for `caption_logits`.
            tokens: Token ids of whole texts, their first and last token included, integers
                (batch, text_len) with text_len up to `max_text_len + 1`.
            text_padding_mask: As for `caption_logits`; padding has no loss.
            chunk_size: Rows whose logits exist at once; None: what fits a fixed memory.

        Returns:
            Mean cross-entropy of all tokens but the first of each text, in nats, float32.

        Raises:
            ValueError: As `caption_logits`; or texts have fewer than two tokens.
            TypeError: As `caption_logits`.
            NotImplementedError: As `caption_logits`.
        """
        head = self._training_head("masked_text")
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(
                "tokens must be (batch, text_len) with at least two tokens, one to predict the "
                f"other, got {tuple(tokens.shape)}."
            )
        labels, mask = tokens[:, 1:].long(), text_padding_mask
        if mask is not None:
            check_mask("text_padding_mask", mask, tuple(tokens.shape))
            labels, mask = labels.masked_fill(mask[:, 1:], _NO_LOSS), mask[:, :-1]
        return linear_cross_entropy(
            self._caption_features(image, tokens[:, :-1], mask),
            head.weight,
            labels,
            bias=head.bias,
            ignore_index=_NO_LOSS,
            chunk_size=chunk_size,
        )

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        *,
        max_new_tokens: int,
        end_id: int,
        prompt: Tensor | None = None,
        prompt_padding_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Writes a text about each image; each ends at `end_id` by itself.

        The image runs through the layers once; then every step runs the newest tokens alone.

        Args:
            image: Images, (batch, in_chans, img_size, img_size).
            max_new_tokens: Most tokens to write for an image.
            end_id: Token that ends a text.
            prompt: How the texts begin, integers (batch, prompt_len); None: with `end_id`.
            prompt_padding_mask: Bool (batch, prompt_len), True = padding, on the right.
            temperature: What logits are divided by before a token is drawn; 0: the likeliest one.
            top_k: Draw among so many of the likeliest; None: among all.
            generator: Draws the tokens; None: the global one.

        Returns:
            The new tokens, int64 (batch, max_new_tokens), filled up with `end_id`.

        Raises:
            ValueError: If an option is out of range, the texts would be longer than
                `max_text_len`, padding is not on the right, the model is in training mode, or as
                `caption_logits`.
            TypeError: If a number is no integer, or as `caption_logits`.
            NotImplementedError: As `caption_logits`.

        Example:
            >>> model = create_model("longnet_beit3_tiny", heads=("masked_text",)).eval()
            >>> tokens = model.generate(torch.randn(2, 3, 64, 64), max_new_tokens=9, end_id=256)
        """
        head = self._training_head("masked_text")
        sampling = Sampling(temperature=temperature, top_k=top_k)
        self._check_generation(max_new_tokens, end_id)
        if prompt is not None:
            check_tokens(prompt, vocab_size=head.out_features, length="prompt_len")
        text, lengths = _begin(len(image), prompt, prompt_padding_mask, end_id, max_new_tokens)
        text, lengths = text.to(image.device), lengths.to(image.device)
        self._check_length(text, max_new_tokens)
        kept = [_KeptKeys() for _ in self.stack.blocks]
        self._run_new(image, None, kept)
        is_done = torch.zeros_like(lengths, dtype=torch.bool)
        first = 0
        # Longer prompts go on where shorter ones have ended, so that no text has gaps.
        for column in range(int(lengths.min()), text.shape[1]):
            features = self._run_new(None, text[:, first:column], kept, first=first)
            chosen = draw_tokens(head(features[:, -1]), sampling, generator=generator)
            is_prompt = column < lengths
            chosen = torch.where(is_done, end_id, chosen)
            text[:, column] = torch.where(is_prompt, text[:, column], chosen)
            is_done |= ~is_prompt & (chosen == end_id)
            is_done |= column + 1 >= lengths + max_new_tokens
            if is_done.all():
                break
            first = column
        places = torch.arange(max_new_tokens, device=text.device)
        return text.gather(1, lengths[:, None] + places)

    def _caption_features(
        self, image: Tensor, tokens: Tensor, text_padding_mask: Tensor | None
    ) -> Tensor:
        """Computes the features of the tokens, (b, t, e)."""
        x, options = self._embed(image, tokens, text_padding_mask)
        if text_padding_mask is not None:
            check_on_the_right("text_padding_mask", text_padding_mask)
        # No token sees the padding behind it, and sequences of one length are attended at once.
        options["key_padding_mask"] = None
        prefix_len = 1 + self.config.num_patches
        op = partial(prefix_attention, prefix_len=prefix_len)
        features = self.stack(x, **options, attention_ops=[op] * len(self.stack.blocks))
        return features[:, prefix_len:]

    def _run_new(
        self, image: Tensor | None, tokens: Tensor | None, kept: list[_KeptKeys], first: int = 0
    ) -> Tensor:
        """Runs the image, or the newest tokens, behind what is kept: features of these alone."""
        x, options = self._embed(image, tokens, first=first)
        return self.stack(x, **options, attention_ops=kept)

    def _check_generation(self, max_new_tokens: int, end_id: int) -> None:
        vocab_size = self._training_head("masked_text").out_features
        if any(type(number) is not int for number in (max_new_tokens, end_id)):
            raise TypeError(
                "max_new_tokens and end_id must be integers, got "
                f"max_new_tokens={max_new_tokens!r} and end_id={end_id!r}."
            )
        if max_new_tokens < 1 or not 0 <= end_id < vocab_size:
            raise ValueError(
                f"max_new_tokens must be 1 or more and end_id in [0, {vocab_size}), got "
                f"max_new_tokens={max_new_tokens} and end_id={end_id}."
            )
        if self.training:
            raise ValueError(
                "generate needs a model in evaluation mode, got one in training mode, which drops "
                "at random. Call model.eval()."
            )
        if self.config.padded_keys == "zero":
            raise ValueError(
                "with padded_keys='zero' an image would not be independent of its text; use "
                "padded_keys='ignore'."
            )

    def _check_length(self, text: Tensor, max_new_tokens: int) -> None:
        most, prompt_len = self.config.max_text_len, text.shape[1] - max_new_tokens
        # The last token that is written runs through no layer.
        if text.shape[1] - 1 > most:
            raise ValueError(
                f"prompt and new tokens may be max_text_len + 1 = {most + 1} tokens, got "
                f"{prompt_len} and max_new_tokens={max_new_tokens}. Create the model with a larger "
                "max_text_len, or write fewer tokens."
            )


class _KeptKeys:
    """The attention op of one layer of BEiT-3 in decoding: keeps its keys and values.

    The first call has the image, whose tokens see each other; the others have the newest tokens of
    the text, which see all up to themselves. These layers have neither a bias nor a decay.
    """

    def __init__(self) -> None:
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, **options: Any
    ) -> Tensor:
        if self._k is None or self._v is None:
            self._k, self._v = k, v
            return dilated_attention(q, k, v, pattern, backend=options["backend"])
        self._k, self._v = torch.cat([self._k, k], dim=1), torch.cat([self._v, v], dim=1)
        return attend_last_rows(q, self._k, self._v, pattern)


def _begin(
    batch: int,
    prompt: Tensor | None,
    padding_mask: Tensor | None,
    end_id: int,
    max_new_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Makes the texts with room for new tokens, (b, t), and the lengths of the prompts, (b,)."""
    if prompt is None:
        if padding_mask is not None:
            raise ValueError("prompt_padding_mask needs prompt, got prompt=None.")
        prompt = torch.full((batch, 1), end_id)
    if len(prompt) != batch:
        raise ValueError(
            f"image and prompt must have the same batch size, got {batch} images and "
            f"{len(prompt)} prompts."
        )
    text = functional.pad(prompt.long(), (0, max_new_tokens), value=end_id)
    if padding_mask is None:
        return text, torch.full((batch,), prompt.shape[1])
    lengths = prompt_lengths("prompt_padding_mask", padding_mask, tuple(prompt.shape))
    text[:, : prompt.shape[1]].masked_fill_(padding_mask, end_id)
    return text, lengths
