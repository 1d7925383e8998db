"""What captions are judged by, and how well text alone would do.

Shapes: b batch, t text_len, v vocabulary.
"""

import collections
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .text_packing import IGNORE_INDEX

__all__ = ["CaptionScores", "TextOnlyModel"]


class CaptionScores:
    """Sums over an evaluation, and over processes at its end.

    Args:
        token_bytes: Bytes of text that each token stands for, (v,).
        word_groups: Words by what they tell, such as colours.
    """

    def __init__(
        self, *, token_bytes: Tensor, word_groups: Mapping[str, frozenset[str]] | None = None
    ) -> None:
        self._token_bytes = token_bytes
        self._groups = dict(word_groups or {})
        groups = [f"{name}_{kind}" for name in self._groups for kind in ("all", "right")]
        names = ["nats", "tokens", "right_tokens", "bytes", "texts", "equal_texts"]
        names += ["true_words", "written_words", "common_words", *groups]
        self._sums = dict.fromkeys(names, 0.0)
        self._answers: dict[str, Counter[frozenset[str]]] = {
            name: Counter() for name in self._groups
        }

    def add_logits(self, logits: Tensor, labels: Tensor) -> None:
        """Adds what the model expects behind each true token.

        Args:
            logits: Logits, (b, t, v).
            labels: The tokens that come, (b, t), `IGNORE_INDEX` where none counts.
        """
        has_loss = labels != IGNORE_INDEX
        logits, labels = logits[has_loss].float(), labels[has_loss]
        nats = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        self._add(
            nats=float(nats),
            tokens=len(labels),
            right_tokens=int((logits.argmax(-1) == labels).sum()),
            bytes=int(self._token_bytes.to(labels.device)[labels].sum()),
        )

    def add_texts(self, true: Sequence[str], written: Sequence[str]) -> None:
        """Adds captions, and what the model wrote instead."""
        for text, other in zip(true, written, strict=True):
            words, others = Counter(text.split()), Counter(other.split())
            self._add(
                texts=1,
                equal_texts=text == other,
                true_words=words.total(),
                written_words=others.total(),
                common_words=(words & others).total(),
            )
            for name, group in self._groups.items():
                answer = group.intersection(words)
                if answer:
                    is_right = answer == group.intersection(others)
                    self._add(**{f"{name}_all": 1, f"{name}_right": is_right})
                    self._answers[name][answer] += 1

    def reduce(self, strategy: Any) -> None:
        """Adds up the sums of all processes of a Lightning strategy."""
        if getattr(strategy, "world_size", 1) > 1:
            sums = torch.tensor(list(self._sums.values()), dtype=torch.float64)
            sums = strategy.reduce(sums.to(strategy.root_device), reduce_op="sum")
            self._sums = dict(zip(self._sums, sums.tolist(), strict=True))

    def figures(self) -> dict[str, float]:
        """Returns the figures by name; those of texts where there were any.

        `loss` is in nats a token. `exact` is the share of captions written letter by letter,
        `word_f1` weighs missing and made-up words alike. Of the captions that name a colour,
        `colour_accuracy` is the share for which exactly that was written, and so for other groups.
        """
        sums, figures = self._sums, {}
        if sums["tokens"]:
            figures["loss"] = sums["nats"] / sums["tokens"]
            figures["bits_per_byte"] = sums["nats"] / math.log(2) / max(1.0, sums["bytes"])
            figures["token_accuracy"] = sums["right_tokens"] / sums["tokens"]
        if sums["texts"]:
            words = sums["true_words"] + sums["written_words"]
            figures["exact"] = sums["equal_texts"] / sums["texts"]
            figures["word_f1"] = 2 * sums["common_words"] / max(1.0, words)
        for name in self._groups:
            if sums[f"{name}_all"]:
                figures[f"{name}_accuracy"] = sums[f"{name}_right"] / sums[f"{name}_all"]
        return figures

    def most_common(self) -> dict[str, float]:
        """Returns the share that always the same answer would have right, of each word group.

        Of the captions that this process has seen.
        """
        return {
            name: answers.most_common(1)[0][1] / answers.total()
            for name, answers in self._answers.items()
            if answers
        }

    def _add(self, **numbers: float) -> None:
        for name, number in numbers.items():
            self._sums[name] += number


class TextOnlyModel:
    """Predicts a token from those before it, by counting: what a caption tells about itself.

    Contexts of every length up to `order - 1` are mixed as Witten and Bell do (IEEE Transactions
    on Information Theory 37(4), 1991): a context that was seen n times with u different tokens
    behind it has the weight n / (n + u), the shorter ones share the rest.

    Args:
        vocab_size: Number of token ids.
        order: Tokens of the longest context, and the one behind it.
    """

    def __init__(self, *, vocab_size: int, order: int = 7) -> None:
        self._vocab_size, self._order = vocab_size, order
        self._counts: dict[tuple[int, ...], Counter[int]] = collections.defaultdict(Counter)

    def learn(self, texts: Iterable[Sequence[int]]) -> None:
        """Counts the tokens of texts; the first of each is known."""
        for text in texts:
            for place in range(1, len(text)):
                for context in self._contexts(text, place):
                    self._counts[context][text[place]] += 1

    def nats(self, text: Sequence[int]) -> float:
        """Returns the loss of a text, summed over all tokens but the first."""
        return -sum(math.log(self._probability(text, place)) for place in range(1, len(text)))

    def _probability(self, text: Sequence[int], place: int) -> float:
        probability = 1 / self._vocab_size
        for context in self._contexts(text, place):
            counts = self._counts.get(context)
            if counts is None:
                break
            seen, different = counts.total(), len(counts)
            probability = (counts[text[place]] + different * probability) / (seen + different)
        return probability

    def _contexts(self, text: Sequence[int], place: int) -> Iterable[tuple[int, ...]]:
        """Returns the tokens before a place, from none to as many as the order allows."""
        longest = min(place, self._order - 1)
        return (tuple(text[place - length : place]) for length in range(longest + 1))
