"""Text from frames without alignments: what connectionist temporal classification (CTC) needs.

Graves et al., "Connectionist temporal classification", ICML 2006. An alignment gives every frame a
symbol or the blank; its text is what remains when repeats are collapsed and then blanks removed.
The probability of a text is the sum over all alignments of it. The prefix beam search is that of
Hannun et al., "First-pass large vocabulary continuous speech recognition using bi-directional
recurrent DNNs" (arXiv 1408.2873), Alg. 1, without a language model.

Shape legend: b batch, t frames, c outputs of the head, k prefixes of the beam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .audio_checks import check_targets

__all__ = ["Transcript", "align", "ctc_loss", "greedy_search", "prefix_beam_search"]


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A text that was read off frames.

    Attributes:
        ids: Its symbols, without blanks.
        frames: The frame where each of them begins, in the best alignment of the text.
        log_prob: Natural logarithm of the probability: of the best alignment for the greedy search,
            of the text, summed over its alignments, for the beam search.
    """

    ids: list[int]
    frames: list[int]
    log_prob: float


def ctc_loss(
    logits: Tensor,
    num_frames: list[int],
    targets: Tensor,
    target_lengths: Tensor,
    *,
    blank_id: int,
) -> Tensor:
    """Computes the mean over a batch of -ln P(text) per symbol, in float32.

    A text with too few frames has probability 0 and an infinite loss. It is refused, not counted as
    0 (PyTorch's `zero_infinity`), which would hide that the model never learns it.

    Args:
        logits: Outputs of the head, (batch, frames, num_classes).
        num_frames: Frames of each sample.
        targets: Symbols, integers (batch, symbols); what lies beyond a length does not matter.
        target_lengths: Symbols of each text, integers (batch,).
        blank_id: The output that stands for no symbol.

    Returns:
        The loss in nats, a scalar.

    Raises:
        TypeError: If `targets` or `target_lengths` are no tensors of integers.
        ValueError: If shapes do not fit, a symbol does not exist or a text is too long.
    """
    num_classes = logits.shape[-1]
    check_targets(targets, target_lengths, num_frames, num_classes=num_classes, blank_id=blank_id)
    log_probs = functional.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    return functional.ctc_loss(
        log_probs,
        targets.to(logits.device, torch.int64),
        torch.tensor(num_frames),
        target_lengths.to("cpu", torch.int64),
        blank=blank_id,
        zero_infinity=False,
    )


def greedy_search(log_probs: Tensor, *, blank_id: int) -> Transcript:
    """Reads off the text of the most probable alignment.

    Args:
        log_probs: Log-probabilities of one sample, (frames, num_classes).
        blank_id: The output that stands for no symbol.

    Raises:
        ValueError: If there is NaN in them.
    """
    _check_numbers(log_probs)
    scores, best = log_probs.max(dim=-1)
    symbols = best.tolist()
    begins = [
        frame
        for frame, symbol in enumerate(symbols)
        if symbol != blank_id and (frame == 0 or symbols[frame - 1] != symbol)
    ]
    ids = [symbols[frame] for frame in begins]
    return Transcript(ids=ids, frames=begins, log_prob=scores.sum(dtype=torch.float64).item())


def prefix_beam_search(
    log_probs: Tensor, *, beam_size: int, blank_id: int, num_texts: int = 1
) -> list[Transcript]:
    """Searches the most probable texts, the alignments of each summed up.

    For a prefix, `blank` and `symbol` are the log-probabilities of its alignments so far that end
    in a blank and in its last symbol. A frame with probabilities p keeps the prefix with a blank,
    (blank + symbol) p[blank_id], or with its last symbol again, symbol p[last]; and it makes a
    longer prefix with any symbol s, (blank + symbol) p[s], or blank p[s] where s is the last one.

    Args:
        log_probs: Log-probabilities of one sample, (frames, num_classes).
        beam_size: Prefixes that are kept after each frame.
        blank_id: The output that stands for no symbol.
        num_texts: Texts wanted, at most `beam_size`.

    Returns:
        Up to `num_texts` texts, the most probable first.

    Raises:
        ValueError: If `num_texts` is below 1 or `beam_size` below `num_texts`, or there is NaN.
    """
    _check_numbers(log_probs)
    if type(beam_size) is not int or not 1 <= num_texts <= beam_size:
        raise ValueError(
            "beam_size must be an integer of at least num_texts, and that at least 1, got "
            f"beam_size={beam_size!r} and num_texts={num_texts!r}."
        )
    beam = _Beam(
        prefixes=[()],
        blank=torch.zeros(1, dtype=torch.float64),
        symbol=torch.full((1,), -torch.inf, dtype=torch.float64),
    )
    log_probs = log_probs.to("cpu", torch.float64)
    for row in log_probs:
        beam = _advance(beam, row, beam_size=beam_size, blank_id=blank_id)
    totals = torch.logaddexp(beam.blank, beam.symbol).tolist()
    return [
        Transcript(ids=list(ids), frames=align(log_probs, ids, blank_id=blank_id), log_prob=total)
        for ids, total in zip(beam.prefixes[:num_texts], totals, strict=False)
    ]


def align(log_probs: Tensor, ids: Sequence[int], *, blank_id: int) -> list[int]:
    """Finds the frame where each symbol of a text begins, in its most probable alignment.

    The text with a blank before, between and behind its symbols is a row of places. An alignment
    walks through them: it stays, goes on by one, or skips the blank between two unequal symbols.

    Args:
        log_probs: Log-probabilities of one sample, (frames, num_classes).
        ids: The symbols; there must be frames enough for them.
        blank_id: The output that stands for no symbol.
    """
    places = torch.full((2 * len(ids) + 1,), blank_id)
    places[1::2] = torch.tensor(ids, dtype=torch.int64)
    can_skip = torch.zeros(len(places), dtype=torch.bool)
    can_skip[3::2] = places[3::2] != places[1:-2:2]
    scores = torch.full((len(places),), -torch.inf, dtype=torch.float64)
    scores[0] = 0.0  # before the first frame: before the first blank or on it, which is as good
    steps = []
    for row in log_probs.to("cpu", torch.float64):
        ways = torch.stack([scores, _moved(scores, 1), _moved(scores, 2)])
        ways[2].masked_fill_(~can_skip, -torch.inf)
        scores, step = ways.max(dim=0)
        scores = scores + row[places]
        steps.append(step.to(torch.int8))
    at = len(places) - 1 - int(len(ids) > 0 and scores[-2] > scores[-1])
    path = []
    for step in reversed(steps):
        path.append(at)
        at -= int(step[at])
    path.reverse()
    begins: dict[int, int] = {}
    for frame, place in enumerate(path):
        begins.setdefault(place, frame)
    return [begins[2 * number + 1] for number in range(len(ids))]


def _check_numbers(log_probs: Tensor) -> None:
    is_wrong = log_probs.isnan().any(dim=-1)
    if is_wrong.any():
        raise ValueError(
            f"log_probs must be numbers, got NaN, first at frame {int(is_wrong.nonzero()[0])}. "
            "Look for it in the weights, or leave half precision."
        )


def _moved(scores: Tensor, places: int) -> Tensor:
    return functional.pad(scores, (places, 0), value=-torch.inf)[: len(scores)]


@dataclass(frozen=True, kw_only=True)
class _Beam:
    """The prefixes kept, the best first, and `blank` and `symbol` of each, (k,)."""

    prefixes: list[tuple[int, ...]]
    blank: Tensor
    symbol: Tensor


def _advance(beam: _Beam, row: Tensor, *, beam_size: int, blank_id: int) -> _Beam:
    """Takes the log-probabilities of one more frame, (c,), in."""
    num_kept, num_classes = len(beam.prefixes), len(row)
    either = torch.logaddexp(beam.blank, beam.symbol)
    longer = either[:, None] + row  # (k, c): the prefix and one more symbol
    longer[:, blank_id] = -torch.inf
    blank, symbol = either + row[blank_id], torch.full_like(either, -torch.inf)
    number_of = {prefix: number for number, prefix in enumerate(beam.prefixes)}
    for number, prefix in enumerate(beam.prefixes):
        if prefix:
            last = prefix[-1]
            symbol[number] = beam.symbol[number] + row[last]
            longer[number, last] = beam.blank[number] + row[last]
    for number, prefix in enumerate(beam.prefixes):
        parent = number_of.get(prefix[:-1]) if prefix else None
        if parent is not None:  # this text is kept and made anew: one text, one sum
            symbol[number] = torch.logaddexp(symbol[number], longer[parent, prefix[-1]])
            longer[parent, prefix[-1]] = -torch.inf
    scores = torch.cat([torch.logaddexp(blank, symbol), longer.flatten()])
    num_possible = int((scores > -torch.inf).sum())
    best = scores.topk(min(beam_size, num_possible)).indices
    prefixes = []
    for index in best.tolist():
        number, new = divmod(index - num_kept, num_classes)
        is_kept = index < num_kept
        prefixes.append(beam.prefixes[index] if is_kept else (*beam.prefixes[number], new))
    impossible = torch.full((longer.numel(),), -torch.inf, dtype=torch.float64)
    return _Beam(
        prefixes=prefixes,
        blank=torch.cat([blank, impossible])[best],
        symbol=torch.cat([symbol, longer.flatten()])[best],
    )
