import itertools
import math
from functools import partial

import pytest
import torch

from longnet_zoo.models.audio_ctc import align, ctc_loss, greedy_search, prefix_beam_search


def collapse(alignment, blank_id):
    """The text of an alignment."""
    return tuple(symbol for symbol, _ in itertools.groupby(alignment) if symbol != blank_id)


def brute_force(log_probs, blank_id):
    """The probability of every text, summed over all alignments."""
    frames, num_classes = log_probs.shape
    texts = {}
    for alignment in itertools.product(range(num_classes), repeat=frames):
        total = sum(log_probs[frame, s].item() for frame, s in enumerate(alignment))
        text = collapse(alignment, blank_id)
        texts[text] = texts.get(text, 0.0) + math.exp(total)
    return texts


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64).mul(2).log_softmax(-1)


@pytest.mark.parametrize("blank_id", [0, 2])
@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_a_wide_beam_finds_every_text_with_its_probability(frames, blank_id):
    for _ in range(3):
        log_probs = draw(frames, 3)
        expected = brute_force(log_probs, blank_id)
        found = prefix_beam_search(log_probs, beam_size=10_000, blank_id=blank_id, num_texts=10_000)
        assert {tuple(x.ids) for x in found} == expected.keys()
        for text in found:
            assert math.exp(text.log_prob) == pytest.approx(expected[tuple(text.ids)], rel=1e-9)
        assert [x.log_prob for x in found] == sorted((x.log_prob for x in found), reverse=True)


def test_a_narrow_beam_mostly_finds_the_best_text_and_beats_the_greedy_search():
    beam, greedy, trials = 0, 0, 40
    for _ in range(trials):
        log_probs = draw(6, 3)
        texts = brute_force(log_probs, 0)
        best = max(texts, key=texts.get)
        found = prefix_beam_search(log_probs, beam_size=4, blank_id=0)
        assert len(found) == 1
        assert found[0].log_prob <= math.log(texts[best]) + 1e-9
        beam += tuple(found[0].ids) == best
        greedy += tuple(greedy_search(log_probs, blank_id=0).ids) == best
    assert beam >= 0.9 * trials > greedy


def test_the_sum_over_alignments_decides_not_the_best_one():
    # "" has the best alignment, 0.6 * 0.6; "a" has three, of 0.24 + 0.24 + 0.16 together.
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert greedy_search(log_probs, blank_id=0).ids == []
    (best,) = prefix_beam_search(log_probs, beam_size=2, blank_id=0)
    assert best.ids == [1]
    assert math.exp(best.log_prob) == pytest.approx(0.64)


def test_greedy_search_collapses_repeats_then_removes_blanks():
    symbols = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0, 0, 3])
    probabilities = torch.full((10, 4), 0.1).scatter(1, symbols[:, None], 0.7)
    found = greedy_search(probabilities.log(), blank_id=0)
    assert found.ids == [1, 1, 2, 3]
    assert found.frames == [1, 4, 5, 9]
    assert found.log_prob == pytest.approx(10 * math.log(0.7))
    assert greedy_search(probabilities.log(), blank_id=2).ids == [0, 1, 0, 1, 0, 3]
    (best,) = prefix_beam_search(probabilities.log(), beam_size=8, blank_id=0)
    assert (best.ids, best.frames) == (found.ids, found.frames)
    assert best.log_prob > found.log_prob


@pytest.mark.parametrize("blank_id", [0, 2])
def test_symbols_begin_where_the_best_alignment_has_them(blank_id):
    for _ in range(3):
        log_probs = draw(6, 3)
        best = {}
        for alignment in itertools.product(range(3), repeat=6):
            total = sum(log_probs[frame, s].item() for frame, s in enumerate(alignment))
            text = collapse(alignment, blank_id)
            best[text] = max(best.get(text, (-math.inf,)), (total, alignment))
        for text, (_, alignment) in best.items():
            changes = [
                frame
                for frame, symbol in enumerate(alignment)
                if symbol != blank_id and (frame == 0 or alignment[frame - 1] != symbol)
            ]
            assert align(log_probs, text, blank_id=blank_id) == changes


@pytest.mark.parametrize(("beam_size", "num_texts"), [(0, 1), (2.0, 1), (2, 3), (2, 0)])
def test_beams_without_a_prefix_are_refused(beam_size, num_texts):
    message = f"got beam_size={beam_size} and num_texts={num_texts}"
    with pytest.raises(ValueError, match=message):
        prefix_beam_search(draw(2, 3), beam_size=beam_size, blank_id=0, num_texts=num_texts)


def test_frames_that_are_no_numbers_are_refused():
    log_probs = draw(5, 3)
    log_probs[2, 1] = torch.nan
    for search in (greedy_search, partial(prefix_beam_search, beam_size=2)):
        with pytest.raises(ValueError, match="must be numbers, got NaN, first at frame 2"):
            search(log_probs, blank_id=0)


@pytest.mark.parametrize("blank_id", [0, 2])
def test_loss_is_the_sum_over_all_alignments(blank_id):
    logits = torch.randn(4, 5, 3)
    others = [symbol for symbol in range(3) if symbol != blank_id]
    texts = [[others[0]], [others[1], others[1]], [], [others[1], others[0], others[1]]]
    frames, targets = [5, 4, 3, 5], torch.full((4, 3), -100)
    expected = 0.0
    for number, text in enumerate(texts):
        targets[number, : len(text)] = torch.tensor(text, dtype=torch.int64)
        log_probs = logits[number, : frames[number]].log_softmax(-1)
        probability = brute_force(log_probs, blank_id)[tuple(text)]
        expected -= math.log(probability) / max(1, len(text)) / 4
    lengths = torch.tensor([len(text) for text in texts])
    loss = ctc_loss(logits, frames, targets, lengths.int(), blank_id=blank_id)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    half = ctc_loss(logits.half(), frames, targets, lengths, blank_id=blank_id)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"targets": torch.tensor([[1, 2], [2, 2]])},
            ValueError,
            "got 2 symbols with 1 repeats for the 2 frames of sample 1. Shorten",
        ),
        ({"num_frames": [1, 2]}, ValueError, "got 2 symbols with 0 repeats for the 1 frames of s"),
        (
            {"targets": torch.tensor([[1, 2], [0, 1]])},
            ValueError,
            "num_classes=3, and not blank_id=0, got 0 for sample 1",
        ),
        ({"targets": torch.tensor([[1, 3], [2, 1]])}, ValueError, "got 3 for sample 0"),
        ({"targets": torch.tensor([[1, -1], [2, 1]])}, ValueError, "got -1 for sample 0"),
        ({"targets": torch.tensor([1, 2])}, ValueError, r"with batch=2, got \(2,\)"),
        ({"targets": torch.ones(2, 2)}, TypeError, "targets must be .*int64, got torch.float32"),
        ({"targets": [[1], [2]]}, TypeError, "targets must be a tensor of int64, got list"),
        (
            {"target_lengths": torch.tensor([2, 3])},
            ValueError,
            "2 symbols .*got 3 for sample 1",
        ),
        ({"target_lengths": torch.tensor([-1, 2])}, ValueError, "got -1 for sample 0"),
        ({"target_lengths": torch.tensor([2])}, ValueError, r"\(batch,\)=\(2,\), got \(1,\)"),
        ({"target_lengths": torch.ones(2)}, TypeError, "target_lengths must be .*torch.float32"),
    ],
)
def test_texts_that_cannot_be_are_refused(changes, error, message):
    options = {
        "num_frames": [2, 2],
        "targets": torch.tensor([[1, 2], [2, 1]]),
        "target_lengths": torch.tensor([2, 2]),
        **changes,
    }
    with pytest.raises(error, match=message):
        ctc_loss(torch.randn(2, 2, 3), **options, blank_id=0)
