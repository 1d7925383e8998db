"""Finding and loading the models of an evaluation."""

import json

import pytest
import torch

from longnet_zoo.long_range import TRAINING_FILE, Source, find_sources, load_source
from tests.long_range.saved_models import make_model, save_run


def test_sources_are_names_folders_and_patterns(tmp_path):
    for seed in (0, 1):
        save_run(tmp_path / f"run-{seed}" / "model", seed)
    found = find_sources([f"a={tmp_path}/run-*/model", "longnet_lm_tiny"])
    assert [source.label for source in found] == ["a", "a", "longnet_lm_tiny"]
    assert found[1].place == f"{tmp_path}/run-1/model"
    model, training = load_source(found[1])
    assert not model.training
    assert training == {}
    for name, weight in make_model(1).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("a=nowhere", "found nothing at 'nowhere'"),
        ("=x", "LABEL=SOURCE or SOURCE, got '=x'"),
        ("chance=longnet_lm_tiny", "other labels than chance and constant.*got 'chance=longnet"),
        ("constant", "other labels than chance and constant.*got 'constant'. Give another LABEL="),
    ],
)
def test_sources_that_are_nowhere_are_refused(word, words):
    with pytest.raises(ValueError, match=words):
        find_sources([word])


def test_places_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="longnet_lm_base has no published weights"):
        load_source(Source(label="a", place="longnet_lm_base"))
    place = Source(label="a", place=str(tmp_path))
    with pytest.raises(ValueError, match=r"which has no config.json. Of a run .* folder `model`"):
        load_source(place)
    for content, words in (
        ("{}", r"folders that save_pretrained wrote.* names no model"),
        ("[1]", r"config.json must hold a JSON object, got a list"),
        ("{", r"config.json must hold a JSON object, got: Expecting property name"),
        ('{"model": "TextModel"}', "whose config.json names no model"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            load_source(place)
    torch.save(make_model(0).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"checkpoints of recipes, got '.*a.pt'"):
        load_source(Source(label="a", place=str(tmp_path / "a.pt")))


def test_a_name_that_looks_like_a_pattern_is_a_name_where_it_exists(tmp_path):
    for name in ("run[1]", "run1"):
        save_run(tmp_path / name, 0)
    (found,) = find_sources([f"a={tmp_path}/run[1]"])
    assert found.place == f"{tmp_path}/run[1]"


@pytest.mark.parametrize("words", [["a=longnet_lm_tiny"] * 2, ["a={0}/x*", "a={0}/x1"]])
def test_a_run_counts_once(tmp_path, words):
    save_run(tmp_path / "x1", 0)
    with pytest.raises(ValueError, match=r"takes a run once, got .* twice as 'a'"):
        find_sources([word.format(tmp_path) for word in words])


@pytest.mark.parametrize("known", [{"train_flops": "x"}, {"train_flops": None}, {"seq_len": [1]}])
def test_facts_of_a_training_that_are_no_numbers_are_refused(tmp_path, known):
    save_run(tmp_path, 0, **known)
    with pytest.raises(ValueError, match=r"training.json must have numbers for train_flops and"):
        load_source(Source(label="a", place=str(tmp_path)))
    (tmp_path / TRAINING_FILE).write_text(json.dumps({"train_flops": float("nan")}))
    with pytest.raises(ValueError, match="got nan and 1"):
        load_source(Source(label="a", place=str(tmp_path)))
