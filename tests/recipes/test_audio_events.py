import torch

from recipes.audio_events import events_of, frame_tags
from recipes.classification_metrics import UNLABELLED


def tags(rows, num_real, *, num_frames=6, frame_rate=2.0):
    events = [None if own is None else torch.tensor(own).reshape(-1, 3) for own in rows]
    return frame_tags(
        events,
        torch.tensor(num_real),
        num_frames=num_frames,
        frame_rate=frame_rate,
        num_classes=2,
    )


def test_frames_that_an_event_touches_are_tagged():
    # Frames are half a second long.
    found = tags([[[0.6, 1.5, 1.0], [2.0, 2.01, 0.0], [0.0, 0.5, 1.0]]], [6])
    assert found[0, :, 1].tolist() == [1, 1, 1, 0, 0, 0]
    assert found[0, :, 0].tolist() == [0, 0, 0, 0, 1, 0]
    assert found.dtype == torch.int64


def test_padding_and_samples_without_events_have_no_tags():
    found = tags([[[0.0, 9.0, 0.0]], None, []], [4, 6, 6])
    assert found[0, :, 0].tolist() == [1, 1, 1, 1, UNLABELLED, UNLABELLED]
    assert found[0, 4:, 1].tolist() == [UNLABELLED] * 2
    assert (found[1] == UNLABELLED).all()
    assert (found[2] == 0).all()


def test_events_of_tags_are_the_events():
    rows = [[0.0, 1.0, 1.0], [0.5, 2.0, 0.0], [2.5, 3.0, 1.0]]
    probabilities = 0.9 * tags([rows], [6])[0].float()
    found = events_of(probabilities, frame_rate=2.0)
    assert [(n, a, b) for n, a, b, _ in found] == [(1, 0.0, 1.0), (0, 0.5, 2.0), (1, 2.5, 3.0)]
    assert all(abs(best - 0.9) < 1e-6 for *_, best in found)
    assert events_of(probabilities, frame_rate=2.0, threshold=0.95) == []


def test_many_hours_have_exact_frames():
    # The last frame of five hours: an event of just that frame tags no other.
    number = 5 * 3600 * 25
    found = tags(
        [[[(number - 1) / 25, number / 25, 0.0]]], [number], num_frames=number, frame_rate=25.0
    )
    assert found[0, :, 0].nonzero()[:, 0].tolist() == [number - 1]
