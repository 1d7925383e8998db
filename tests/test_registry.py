from dataclasses import dataclass

import pytest
from torch import nn

from longnet_zoo import registry
from longnet_zoo.registry import (
    PublishedWeights,
    find_model,
    nearest_names,
    register_model,
    registered_models,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 3


def build(config):
    return nn.Linear(config.size, 1)


FIELDS = {"config": Config(), "description": "a test", "source": "nowhere"}


@pytest.fixture(autouse=True)
def catalogue(monkeypatch):
    """Replaces the catalogue by one of three models."""
    monkeypatch.setattr(registry, "_ENTRIES", {})
    weights = (PublishedWeights(tag="wild", location="b.safetensors", licence="MIT"),)
    register_model("deer_b", family="deer", modality="text", weights=weights, **FIELDS)(build)
    register_model("deer_a", family="deer", modality="text", **FIELDS)(build)
    register_model("fox_a", family="fox", modality="audio", **FIELDS)(build)


def names(*args, **kwargs):
    return [entry.name for entry in registered_models(*args, **kwargs)]


def test_decorator_returns_the_builder_and_keeps_what_it_was_told():
    assert register_model("new", family="fox", modality="audio", **FIELDS)(build) is build
    entry = find_model("new")
    assert entry.build(Config(size=7)).in_features == 7
    assert (entry.name, entry.family, entry.modality) == ("new", "fox", "audio")
    assert (entry.description, entry.source, entry.weights) == ("a test", "nowhere", ())


def test_same_name_twice_is_refused_with_both_builders():
    def other(config):
        return nn.Identity()

    with pytest.raises(ValueError, match=r"got 'fox_a' for .*other.*registered for .*build"):
        register_model("fox_a", family="fox", modality="audio", **FIELDS)(other)
    assert find_model("fox_a").build is build


def test_filters_combine_and_names_are_sorted():
    assert names() == ["deer_a", "deer_b", "fox_a"]
    assert names("*_a") == ["deer_a", "fox_a"]
    assert names("*_a", modality="audio") == ["fox_a"]
    assert names(family="deer", pretrained=True) == ["deer_b"]
    assert names(pretrained=False) == ["deer_a", "fox_a"]
    assert names("DEER*") == names("wolf*") == []


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"modality": "smell"}, "modality must be one of 'audio', 'text', got 'smell'"),
        ({"family": "wolf"}, "family must be one of 'deer', 'fox', got 'wolf'"),
    ],
)
def test_filter_that_no_model_can_meet_is_refused(filters, message):
    with pytest.raises(ValueError, match=message):
        registered_models(**filters)


def test_unknown_name_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"name 'dear_a'. Did you mean 'deer_a' or 'deer_b'\?"):
        find_model("dear_a")
    with pytest.raises(ValueError, match=r"name 'zzz'. list_models\(\) has all names"):
        find_model("zzz")
    with pytest.raises(TypeError, match=r"must be strings, got 3 \(int\)"):
        find_model(3)


def test_nearest_names_reads_as_a_sentence():
    assert nearest_names("ab", ["ab1", "ab2", "ab3"]).count(",") == 1
    assert nearest_names("ab1x", ["ab1", "zz"]) == "'ab1'"
    assert nearest_names("q", ["ab1"]) == ""
