"""Samples with the same modalities are a batch of their own."""

import pytest
import torch

from longnet_zoo.layers.presence import (
    Samples,
    check_presence,
    own_masks,
    run_grouped,
    take_part,
)

NAMES = ("a", "b", "c")


def samples(batch=4, **options):
    inputs = {
        "a": torch.arange(float(batch))[:, None],
        "b": torch.arange(10.0, 10 + batch)[:, None],
    }
    return Samples(**{"inputs": inputs, "times": {}, "padding_masks": {}, **options})


def test_each_set_of_modalities_is_run_once_with_its_own_samples():
    times = {"a": torch.zeros(1, 1), "b": torch.arange(4.0)[:, None]}
    masks = {"b": torch.tensor([[True], [False], [False], [True]])}
    calls = []

    def run(own):
        calls.append(own)
        return {name: x * 2 for name, x in own.inputs.items()}

    present = {"a": [True, False, True, True], "b": [True, True, False, True]}
    out = run_grouped(run, samples(times=times, padding_masks=masks), present)
    assert [(list(own.inputs), own.batch) for own in calls] == [
        (["a", "b"], 2),
        (["b"], 1),
        (["a"], 1),
    ]
    assert calls[0].times["b"].tolist() == [[0.0], [3.0]]
    assert calls[0].times["a"].tolist() == [[0.0]]
    assert calls[0].padding_masks["b"].tolist() == [[True], [True]]
    assert set(calls[2].times) == {"a"}
    assert calls[2].padding_masks == {}
    assert list(out) == ["a", "b"]
    assert out["a"].flatten().tolist() == [0, 0, 4, 6]
    assert out["b"].flatten().tolist() == [20, 22, 0, 26]


def test_whole_batches_are_not_copied():
    whole = samples()
    out = run_grouped(lambda own: {"x": own.inputs["a"]}, whole, None)
    assert out["x"] is whole.inputs["a"]


def test_presence_is_checked():
    inputs = {"b": torch.zeros(2, 3), "a": torch.zeros(2, 3), "c": None}
    found, has = check_presence(inputs, None, names=NAMES)
    assert list(found) == ["a", "b"]
    assert has is None
    _, has = check_presence(
        inputs, {"a": torch.tensor([True, True]), "c": [False] * 2}, names=NAMES
    )
    assert has is None
    _, has = check_presence(inputs, {"a": torch.tensor([True, False])}, names=NAMES)
    assert has == {"a": [True, False], "b": [True, True]}


@pytest.mark.parametrize(
    ("inputs", "present", "message"),
    [
        ({"d": torch.zeros(2, 3)}, None, r"inputs must be of the modalities a, b, c, got \['d'\]"),
        ({"a": torch.zeros(2, 3)}, {"d": [True]}, r"present must be of .* got \['d'\]"),
        ({"a": None}, None, "at least one of a, b, c, got none"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, None, r"got \{'a': 2, 'b': 3\}"),
        ({"a": torch.zeros(0, 3)}, None, r"of at least 1, got \{'a': 0\}"),
        ({"a": torch.zeros(2, 3)}, {"b": [False, True]}, "samples have 'b', got no input"),
        ({"a": torch.zeros(2, 3)}, {"a": [True, False]}, r"got none for the samples \[1\]"),
        ({"a": torch.zeros(2, 3)}, {"a": [True]}, r"must be bool \(2,\), got 1 values"),
    ],
)
def test_presence_that_cannot_be_is_refused(inputs, present, message):
    with pytest.raises(ValueError, match=message):
        check_presence(inputs, present, names=NAMES)


def test_presence_is_bool():
    with pytest.raises(TypeError, match=r"present\['a'\] must be bool \(batch,\), got tensor\(\[1"):
        check_presence({"a": torch.zeros(2, 3)}, {"a": torch.tensor([1, 0])}, names=NAMES)


def test_what_nobody_has_is_not_looked_at():
    inputs = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 0)}
    found, has = check_presence(inputs, {"b": [False, False]}, names=NAMES)
    assert list(found) == ["a"]
    assert has is None
    present = {"a": [True, False], "b": [False, False]}
    found, has = check_presence({**inputs, "c": inputs["a"]}, present, names=NAMES)
    assert list(found) == ["a", "c"]
    assert has == {"a": [True, False], "c": [True, True]}


def test_masks_are_of_the_samples():
    found, mask = {"a": torch.zeros(2, 3), "c": torch.zeros(2, 4)}, torch.zeros(2, 3).bool()
    assert own_masks(None, found, names=NAMES) == {}
    assert own_masks({"a": mask, "b": mask, "c": None}, found, names=NAMES) == {"a": mask}
    with pytest.raises(ValueError, match=r"padding_masks must be of .* got \['d'\]"):
        own_masks({"d": mask}, found, names=NAMES)
    # Samples are taken by their number, so a mask of others would go unnoticed later.
    for wrong in (mask[:1], mask.repeat(2, 1), mask[0, 0]):
        with pytest.raises(ValueError, match=r"masks\['a'\] must have a row for each of the 2 sa"):
            own_masks({"a": wrong}, found, names=NAMES)


def test_a_single_process_leaves_unused_parameters_without_gradient():
    x = torch.ones(3, requires_grad=True)
    assert take_part(x, [torch.ones(2, requires_grad=True)]) is x
