"""Saving and loading by huggingface_hub's mixin; what models compute is tested family by family."""

import copy
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import hub_mixin
from safetensors.torch import load_file, save_file

from longnet_zoo.models import LongNetLM, LongNetLMConfig, LongNetMLM, LongNetMLMConfig

CONFIG = LongNetLMConfig(
    vocab_size=61,
    embed_dim=24,
    num_layers=2,
    num_heads=4,
    segment_lengths=(7, 16),
    dilation_rates=(1, 3),
    padded_keys="zero",
    dropout=0.5,
)
TOKENS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def model():
    return LongNetLM(CONFIG).eval()


def assert_same(model, other):
    assert type(other) is type(model)
    assert other.config == model.config
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_saved_model_comes_back(model, tmp_path):
    assert model.save_pretrained(tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    loaded = LongNetLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert not loaded.training
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model"] == "LongNetLM"
    assert "longnet_zoo" in (tmp_path / "README.md").read_text()


def test_new_head_is_saved_with_its_config(model, tmp_path):
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    loaded = LongNetLM.from_pretrained(tmp_path)
    assert loaded(TOKENS).shape == (2, 20, 7)
    assert_same(model, loaded)
    # And from there on.
    loaded.reset_classifier(0)
    loaded.save_pretrained(tmp_path)
    assert_same(loaded, LongNetLM.from_pretrained(tmp_path))


def test_options_can_be_changed_while_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LongNetLM.from_pretrained(tmp_path, dropout=0.0, segment_lengths=(8, 16))
    assert loaded.config == replace(CONFIG, dropout=0.0, segment_lengths=(8, 16))
    config = replace(CONFIG, dropout=0.25)
    assert LongNetLM.from_pretrained(tmp_path, config=config).config == config
    with pytest.raises(TypeError, match=r"has no options dropot, strict\. .*are embed_dim, "):
        LongNetLM.from_pretrained(tmp_path, dropot=0.1, strict=True)
    message = r"changes \{'num_layers': 3\}; leave .*Missing key.*stack\.blocks\.2"
    with pytest.raises(ValueError, match=message):
        LongNetLM.from_pretrained(tmp_path, num_layers=3)


@pytest.mark.parametrize("place", ["/no/such", Path("/no/such")])
def test_folder_that_does_not_exist_is_refused(place):
    with pytest.raises(FileNotFoundError, match=r"'owner/name' of the Hub, got '/no/such', which"):
        LongNetLM.from_pretrained(place)


def test_config_of_another_model_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one of LongNetMLM, got model='LongNetLM'"):
        LongNetMLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="LongNetLM takes a LongNetLMConfig, got LongNetMLMConfig"):
        LongNetLM.from_pretrained(tmp_path, config=LongNetMLMConfig())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "depth": 3}))
    with pytest.raises(ValueError, match=r"the unknown fields \['depth'\]"):
        LongNetLM.from_pretrained(tmp_path)


def test_damaged_and_missing_weights_are_told_by_their_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged: .* Save or copy it again"
    ):
        LongNetLM.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors must be what save_pretrained"):
        LongNetLM.from_pretrained(tmp_path)


def test_loading_is_strict(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["stack.norm.gain"] = weights.pop("stack.norm.weight")
    save_file(weights, path)
    message = r"does not fit its config\. .*Missing key[^?]*Unexpected key"
    with pytest.raises(ValueError, match=message) as caught:
        LongNetLM.from_pretrained(tmp_path)
    assert "stack.norm.weight" in str(caught.value)
    assert "stack.norm.gain" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_refused(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        LongNetLM.from_pretrained(tmp_path)


def test_weights_may_be_loaded_without_their_config_by_giving_one(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert_same(model, LongNetLM.from_pretrained(tmp_path, config=CONFIG))


def test_model_is_saved_with_its_own_config_only(model, tmp_path):
    model.save_pretrained(tmp_path, config=CONFIG)
    model.save_pretrained(tmp_path, config=asdict(CONFIG))
    with pytest.raises(ValueError, match=r"its own config, .*dropout=0\.5.*got config=.*=0\.125"):
        model.save_pretrained(tmp_path, config=replace(CONFIG, dropout=0.125))


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_uploads_what_can_be_loaded(how, model, tmp_path, monkeypatch):
    calls = []

    class FakeHub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, **options):
            calls.append(repo_id)
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, **options):
            calls.append(options["commit_message"])
            assert_same(model, LongNetLM.from_pretrained(folder_path))
            return "the commit"

    monkeypatch.setattr(hub_mixin, "HfApi", FakeHub)
    model.reset_classifier(7)
    if how == "push_to_hub":
        commit = model.push_to_hub("me/mine", token="t", commit_message="words")
    else:
        commit = model.save_pretrained(
            tmp_path, push_to_hub=True, repo_id="me/mine", token="t", commit_message="words"
        )
    assert commit == "the commit"
    assert calls == ["t", "me/mine", "words"]


def test_model_can_be_copied_and_pickled(model):
    model.reset_classifier(7)
    assert_same(model, copy.deepcopy(model))
    assert_same(model, pickle.loads(pickle.dumps(model)))


def test_map_location_is_where_the_model_goes(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LongNetLM.from_pretrained(tmp_path, map_location="meta")
    assert {x.device.type for x in loaded.parameters()} == {"meta"}
