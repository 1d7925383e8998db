"""How a causal model writes: it reads a prompt in chunks, then its own tokens one by one.

Shape legend: b batch, t prompt_len, e embed_dim, v vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from longnet_zoo.ops.sampling import Sampling, draw_tokens
from longnet_zoo.ops.streaming import StreamingCache

from .checks import check_tokens, integer_list, prompt_lengths

if TYPE_CHECKING:
    from .text import TextModel

__all__ = ["GeneratesText", "TextDecoder"]

# Characters of UTF-8 have up to four bytes, each a token of its own for some tokenizers.
_TOKENS_PER_CHARACTER = 4


class TextDecoder(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids."""
        ...


class GeneratesText:
    """Gives a causal text model its method `generate`."""

    @torch.no_grad()
    def generate(
        self: Any,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        key_padding_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        tokenizer: TextDecoder | None = None,
        banned_ids: Sequence[int] = (),
        fill_id: int | None = None,
        streamer: Callable[[Tensor], object] | None = None,
        cache: StreamingCache | None = None,
        chunk_size: int = 8192,
    ) -> Tensor:
        """Writes on: memory and time of a token do not depend on how many came before.

        The prompt is read in chunks, so it may be far longer than what fits in memory at once.

        Args:
            tokens: The prompts, integers (batch, prompt_len), at least one token each.
            max_new_tokens: Most tokens to write after a prompt.
            key_padding_mask: Bool (batch, prompt_len), True = padding, on the right.
            temperature: What logits are divided by; 0 takes the likeliest token.
            top_k: Draw among so many of the likeliest tokens; None: among all.
            top_p: Draw among the likeliest tokens that together have this probability.
            min_p: Draw among tokens with this share of the likeliest one's probability.
            repetition_penalty: Above 1 makes tokens of the prompt and of the answer less likely.
            seed: Start of the random numbers; None: the global ones.
            stop_ids: Tokens after which a row is done.
            stop_strings: Texts after which a row is done; they are part of the result.
            tokenizer: Turns new tokens into text, for `stop_strings`.
            banned_ids: Tokens that are never drawn.
            fill_id: What rows that are done are filled up with; None: the first of `stop_ids`.
            streamer: Called with the tokens of every step, int64 (batch,), as soon as they are
                drawn; for example the method `put` of a streamer of Transformers.
            cache: What was read before, which the prompts follow; None: nothing. At the end it has
                read all but the last new token.
            chunk_size: Tokens of the prompt that are read at once.

        Returns:
            The new tokens, int64 (batch, num_new), at most `max_new_tokens`.

        Raises:
            ValueError: If an option is out of range or does not fit the others, the model is in
                training mode or has no output head, padding is not on the right, or a prompt is
                empty.
            TypeError: If an argument is of the wrong kind.
            NotImplementedError: If the model has `extra_branches`, which keep no cache; the message
                names what writes without one.

        Example:
            >>> model = create_model("longnet_lm_tiny").eval()
            >>> prompt = torch.tensor([list(b"def ")])
            >>> tokens = model.generate(prompt, max_new_tokens=100, temperature=0.8, seed=0)
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        stop_ids = integer_list("stop_ids", stop_ids)
        banned_ids = integer_list("banned_ids", banned_ids)
        _check_numbers(self, max_new_tokens, chunk_size, seed)
        _check_ids(self, stop_ids=stop_ids, banned_ids=banned_ids, fill_id=fill_id)
        check_tokens(tokens, vocab_size=self.config.vocab_size, length="prompt_len")
        lengths = _lengths(tokens, key_padding_mask)
        is_stopped = _StopRules(stop_ids, stop_strings, tokenizer, tokens.device)
        fill = _fill_id(fill_id, stop_ids, stop_strings, batch=len(tokens))
        cache = self.make_cache(len(tokens)) if cache is None else cache
        generator = _generator(seed, tokens.device)
        seen = _Seen(self.config.head_size, tokens, key_padding_mask, sampling)
        features = _read_prompt(self, tokens, lengths, key_padding_mask, cache, chunk_size)
        banned = torch.tensor(banned_ids, dtype=torch.int64, device=tokens.device)
        is_done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        written: list[Tensor] = []
        while True:
            new = draw_tokens(
                self.forward_head(features),
                sampling,
                generator=generator,
                seen=seen.mask,
                banned_ids=banned,
            )
            new = new.masked_fill(is_done, fill)
            seen.add(new)
            written.append(new)
            if streamer is not None:
                streamer(new)
            is_done |= is_stopped(written)
            if len(written) == max_new_tokens or (is_stopped.can_stop and bool(is_done.all())):
                return torch.stack(written, dim=1)
            features = self.forward_features(new[:, None], cache=cache)[:, -1]


class _StopRules:
    """Says which rows are done."""

    def __init__(
        self,
        ids: Sequence[int],
        strings: Sequence[str],
        tokenizer: TextDecoder | None,
        device: torch.device,
    ) -> None:
        if isinstance(strings, str) or not all(isinstance(x, str) and x for x in strings):
            raise TypeError(
                f"stop_strings must be texts that are not empty, got {strings!r}. Put a single one "
                "in a tuple."
            )
        # Bytes of a command line that are no UTF-8 have become surrogates, which no text has.
        if any("\ud800" <= character <= "\udfff" for x in strings for character in x):
            raise ValueError(
                f"stop_strings must be of characters that UTF-8 has, got {tuple(strings)!r}."
            )
        if strings and tokenizer is None:
            raise ValueError(f"stop_strings={tuple(strings)} need tokenizer, got tokenizer=None.")
        self._strings, self._tokenizer = strings, tokenizer
        self._ids = torch.tensor(ids, dtype=torch.int64, device=device)
        longest = max(map(len, strings), default=0)
        self._num_tail = _TOKENS_PER_CHARACTER * (longest + 1)

    @property
    def can_stop(self) -> bool:
        """Whether there is a rule."""
        return bool(len(self._ids) or self._strings)

    def __call__(self, written: list[Tensor]) -> Tensor:
        """Whether each row ends with the last token, bool (b,)."""
        new = written[-1]
        is_stopped = torch.isin(new, self._ids)
        if self._strings and self._tokenizer is not None:
            tails = torch.stack(written[-self._num_tail :], dim=1).tolist()
            texts = [self._tokenizer.decode(tail) for tail in tails]
            found = [any(string in text for string in self._strings) for text in texts]
            is_stopped |= torch.tensor(found, device=new.device)
        return is_stopped


class _Seen:
    """The tokens of each row so far, where a penalty asks for them."""

    def __init__(
        self, vocab_size: int, tokens: Tensor, padding_mask: Tensor | None, sampling: Sampling
    ) -> None:
        self.mask: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            is_real = torch.ones_like(tokens, dtype=torch.bool)
            if padding_mask is not None:
                is_real = ~padding_mask
            counts = torch.zeros(len(tokens), vocab_size, dtype=torch.int64, device=tokens.device)
            self.mask = counts.scatter_add_(1, tokens.long(), is_real.long()) > 0

    def add(self, new: Tensor) -> None:
        if self.mask is not None:
            self.mask.scatter_(1, new[:, None], True)


def _read_prompt(
    model: TextModel,
    tokens: Tensor,
    lengths: Tensor,
    padding_mask: Tensor | None,
    cache: StreamingCache,
    chunk_size: int,
) -> Tensor:
    """Reads the prompts: features of the last token of each, (b, e)."""
    last: Tensor | None = None
    for start, chunk, mask in _chunks(tokens, padding_mask, chunk_size):
        features = model.forward_features(chunk, key_padding_mask=mask, cache=cache)
        place = lengths - 1 - start
        own = features[
            torch.arange(len(chunk), device=place.device), place.clamp(0, chunk.shape[1] - 1)
        ]
        is_last = (place >= 0) & (place < chunk.shape[1])
        last = own if last is None else torch.where(is_last[:, None], own, last)
    assert last is not None
    return last


def _chunks(
    tokens: Tensor, padding_mask: Tensor | None, size: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    for start in range(0, tokens.shape[1], size):
        own = slice(start, start + size)
        yield start, tokens[:, own], None if padding_mask is None else padding_mask[:, own]


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def _fill_id(
    given: int | None, stop_ids: Sequence[int], stop_strings: Sequence[str], *, batch: int
) -> int:
    if given is not None:
        return given
    if stop_strings and not stop_ids and batch > 1:
        raise ValueError(
            f"rows that end at stop_strings are filled up, got a batch of {batch} without fill_id "
            "and stop_ids. Pass fill_id, such as the tokenizer's pad_id."
        )
    return next(iter(stop_ids), 0)


def _lengths(tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Counts the tokens of each prompt, (b,)."""
    if padding_mask is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return prompt_lengths("key_padding_mask", padding_mask, tuple(tokens.shape))


def check_seed(seed: int | None) -> None:
    """Refuses what no generator of random numbers takes.

    Raises:
        ValueError: If it is neither None nor an integer in [0, 2**63).
    """
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(f"seed must be None or an integer in [0, 2**63), got {seed!r}.")


def _check_numbers(model: Any, max_new_tokens: int, chunk_size: int, seed: int | None) -> None:
    check_seed(seed)
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
        if type(value) is not int:
            raise TypeError(f"{name} must be an integer, got {value!r}.")
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    if model.config.vocab_size is None or model.config.head_size != model.config.vocab_size:
        raise ValueError(
            "generate needs a model whose head predicts the tokens it reads, got "
            f"vocab_size={model.config.vocab_size} and {model.config.head_size} outputs."
        )


def _check_ids(model: Any, *, fill_id: int | None, **ids: list[int]) -> None:
    ids["fill_id"] = [] if fill_id is None else integer_list("fill_id", [fill_id])
    for name, own in ids.items():
        wrong = [x for x in own if not 0 <= x < model.config.head_size]
        if wrong:
            raise ValueError(f"{name} must be in [0, {model.config.head_size}), got {wrong}.")
