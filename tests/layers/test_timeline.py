"""Tokens of several modalities in the order of time, and back."""

import pytest
import torch

from longnet_zoo.layers.timeline import Timeline, as_rows


def merge(lengths, times=None, masks=None, *, batch=1, time_rate=10.0):
    inputs = {name: torch.empty(batch, length, 3) for name, length in lengths.items()}
    return Timeline.merge(
        inputs,
        times={name: torch.tensor(x, dtype=torch.float64) for name, x in (times or {}).items()},
        padding_masks={name: torch.tensor(x) for name, x in (masks or {}).items()},
        time_rate=time_rate,
    )


def test_tokens_follow_time_and_ties_the_order_of_modalities():
    times = {"a": [[0.0, 2.0, 4.0]], "b": [[0.0, 1.0, 2.0, 3.0]]}
    timeline = merge({"a": 3, "question": 2, "b": 4}, times)
    # Stored: a 0-2, question 3-4, b 5-8.
    assert timeline.order.tolist() == [[3, 4, 0, 5, 6, 1, 7, 8, 2]]
    assert timeline.positions.tolist() == [[0, 20, 40, -2, -1, 0, 10, 20, 30]]


def test_origin_of_time_does_not_matter_and_its_rate_does():
    times = {"a": [[5.0, 7.0]], "b": [[6.0]]}
    later = {name: [[x + 1e6 for x in row] for row in rows] for name, rows in times.items()}
    early, late = merge({"a": 2, "b": 1}, times), merge({"a": 2, "b": 1}, later)
    assert torch.equal(early.positions, late.positions)
    assert early.positions.tolist() == [[0, 20, 10]]
    fast = merge({"a": 2, "b": 1}, times, time_rate=0.5)
    assert fast.positions.tolist() == [[0, 1, 0.5]]


def test_samples_may_have_times_of_their_own_and_padding_goes_to_the_end():
    times = {"a": [[1.0, 2.0], [4.0, torch.nan]], "b": [[0.0, 3.0, 5.0]]}
    masks = {"a": [[False, False], [False, True]]}
    timeline = merge({"a": 2, "b": 3}, times, masks, batch=2)
    assert timeline.order.tolist() == [[2, 0, 1, 3, 4], [2, 3, 0, 4, 1]]
    assert timeline.is_padding.tolist() == [[False] * 5, [False] * 4 + [True]]
    assert timeline.positions.tolist() == [[10, 20, 0, 30, 50], [40, 0, 0, 30, 50]]
    assert set(timeline.padding_masks) == {"a"}


def test_stored_undoes_merged():
    times = {"a": [[1.0, 2.0], [4.0, 0.0]], "b": [[0.0, 3.0, 5.0]]}
    for batch, own in ((2, times), (2, {"b": [[5.0, 1.0, 3.0]]})):
        timeline = merge({"a": 2, "b": 3}, own, batch=batch)
        x = torch.randn(batch, 5, 2, 3)
        merged = timeline.merged(x)
        order = timeline.order.expand(batch, -1)
        expected = torch.stack([row[places] for row, places in zip(x, order, strict=True)])
        assert torch.equal(merged, expected)
        assert torch.equal(timeline.stored(merged), x)


def test_without_times_modalities_follow_each_other():
    timeline = merge({"a": 2, "b": 3})
    assert timeline.order is None
    assert timeline.positions.tolist() == [[-5, -4, -3, -2, -1]]
    x = torch.randn(1, 5, 2, 3)
    assert timeline.merged(x) is x
    assert timeline.stored(x) is x
    assert {name: part.shape[1] for name, part in timeline.split(x).items()} == {"a": 2, "b": 3}


def test_times_that_are_none_are_refused():
    for bad in (torch.nan, torch.inf, -torch.inf):
        message = rf"times must be finite, got {bad} in row 0 at place 3 of"
        with pytest.raises(ValueError, match=message):
            merge({"a": 2, "b": 3}, {"b": [[0.0, bad, 1.0]]})
    with pytest.raises(TypeError, match=r"times of 'a' must be .* real numbers, got torch\.bool"):
        as_rows("a", torch.ones(3, dtype=torch.bool), batch=1, length=3)
    with pytest.raises(TypeError, match="of real numbers, got list"):
        as_rows("a", [1.0, 2.0], batch=1, length=2)
    with pytest.raises(ValueError, match=r"must be \(3,\) or \(2 or 1, 3\), .*got \(2, 4\)"):
        as_rows("a", torch.ones(2, 4), batch=2, length=3)
