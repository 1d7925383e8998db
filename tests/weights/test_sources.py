import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longnet_zoo.registry import PublishedWeights, find_model
from longnet_zoo.weights import DownloadOptions, find_weights, sources
from tests.weights.servers import serve

STATE = {"weight": torch.arange(6.0).reshape(2, 3)}
ENTRY = find_model("longnet_lm_base")


def entry_with(*weights):
    return replace(ENTRY, weights=weights)


def published(path, **options):
    return PublishedWeights(**{"tag": "t", "location": str(path), "licence": "MIT", **options})


def find(pretrained, entry=ENTRY, **options):
    return find_weights(entry, pretrained, DownloadOptions(**options))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    return path


def test_nothing_is_looked_for_without_pretrained():
    assert find(False) is None


def test_state_dict_is_taken_as_it_is():
    found = find(STATE)
    assert found.state_dict == STATE
    assert found.state_dict["weight"] is STATE["weight"]
    assert (found.source, found.config, found.options) == ("the state dict", None, {})


def test_state_dict_is_unwrapped_like_a_file():
    wrapped = {"model": {f"module.{key}": x for key, x in STATE.items()}, "epoch": 3}
    assert find(wrapped).state_dict.keys() == STATE.keys()


@pytest.mark.parametrize("as_type", [str, Path])
def test_file_is_read(as_type, file):
    found = find(as_type(file))
    assert torch.equal(found.state_dict["weight"], STATE["weight"])
    assert found.source == repr(str(file))


def test_home_is_resolved(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    assert "weight" in find("~/w.safetensors").state_dict


def test_true_takes_the_first_and_a_tag_its_own(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"weight": torch.tensor(value)}, tmp_path / f"{name}.safetensors")
    entry = entry_with(
        published(tmp_path / "a.safetensors", tag="a"),
        published(tmp_path / "b.safetensors", tag="b", options={"dropout": 0.1}),
    )
    assert find(True, entry).state_dict["weight"] == 1.0
    assert find("a", entry).state_dict["weight"] == 1.0
    found = find("b", entry)
    assert found.state_dict["weight"] == 2.0
    assert found.options == {"dropout": 0.1}


def test_folder_of_one_file(file):
    assert "weight" in find(file.parent).state_dict
    (file.parent / "notes.txt").touch()
    assert find(str(file.parent)).config is None


def test_folder_with_config_takes_the_saved_model(file):
    file.rename(file.parent / "model.safetensors")
    torch.save({}, file.parent / "optimizer.pt")
    (file.parent / "config.json").write_text(json.dumps({"model": "X"}))
    found = find(file.parent)
    assert found.config == {"model": "X"}
    assert "weight" in found.state_dict


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], FileNotFoundError, r"must have a weights file \(.safetensors.*got none"),
        (["config.json"], FileNotFoundError, "must have a weights file .*got none"),
        (["b.pth", "a.bin"], ValueError, r"got 2: a\.bin, b\.pth\. Pass the path of the one"),
        (["model.safetensors", "a.bin"], ValueError, r"got 2: a\.bin, model\.safetensors"),
    ],
)
def test_folder_without_one_weights_file_is_refused(names, error, message, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(error, match=message):
        find(tmp_path)


def test_saved_file_takes_the_config_beside_it(file):
    config = file.with_name("config.json")
    config.write_text(json.dumps({"model": "X"}))
    assert find(file).config is None  # another file than save_pretrained writes
    saved = file.rename(file.with_name("model.safetensors"))
    assert find(saved).config == {"model": "X"}
    config.write_text(json.dumps({"architectures": ["X"]}))
    assert find(saved).config is None
    assert find(saved.parent).config == {"architectures": ["X"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"config\.json' must be JSON, got: Expect"), ("[1]", "a JSON object, got list")],
)
def test_damaged_config_is_refused(text, message, file):
    (file.parent / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        find(file.parent)


@pytest.mark.parametrize("word", ["dino", "org/model", "gone.pth", "", Path("gone.pth")])
def test_word_that_names_nothing_is_refused_with_all_that_would(word):
    entry = entry_with(published("x.pth", tag="dino_a"), published("y.pth", tag="dino_b"))
    with pytest.raises(FileNotFoundError, match=r"tags: 'dino_a', 'dino_b'\), no file") as caught:
        find(word, entry)
    assert f"pretrained={str(word)!r} does not exist" in str(caught.value)
    assert "'hf_hub:owner/name[@revision][/file]'" in str(caught.value)


def test_model_without_published_weights_says_so():
    with pytest.raises(ValueError, match="no weights are published for 'longnet_lm_base'"):
        find(True)
    with pytest.raises(FileNotFoundError, match="tags: none"):
        find("gone.pth")


@pytest.mark.parametrize("value", [3, None, [STATE]])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match=f"True, a tag, .*got {type(value).__name__}"):
        find(value)


def test_registered_digest_is_compared(file):
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    assert find(True, entry_with(published(file, sha256=right))).state_dict
    with pytest.raises(ValueError, match=f"must have SHA-256 {'0' * 64}, got {right}"):
        find(True, entry_with(published(file, sha256="0" * 64)))


def test_unknown_digest_is_logged_for_registered_weights_only(file, caplog):
    with caplog.at_level(logging.INFO):
        find(file)
        assert caplog.messages == []
        find(True, entry_with(published(file)))
    (message,) = caplog.messages
    assert hashlib.sha256(file.read_bytes()).hexdigest() in message


def test_address_is_downloaded_and_checked(file, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = file.read_bytes()
    with serve() as server:
        server.files["/w.safetensors"] = content
        url = f"{server.url}/w.safetensors"
        with caplog.at_level(logging.INFO):
            assert "weight" in find(url + "?download=1", cache_dir=tmp_path / "c").state_dict
        assert hashlib.sha256(content).hexdigest() in caplog.text
        with pytest.raises(ValueError, match="must have SHA-256"):
            find(True, entry_with(published(url, sha256="1" * 64)), cache_dir=tmp_path / "c")
        with pytest.raises(ValueError, match=r"ending in .*got '/w\.zip'"):
            find(f"{server.url}/w.zip", cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    ("pretrained", "options", "message"),
    [
        (False, {"revision": "v1"}, "got revision='v1' with pretrained=False"),
        (STATE, {"revision": "v1"}, "got revision='v1' with pretrained=dict"),
        (STATE, {"token": "secret"}, r"got token=\.\.\. with pretrained=dict"),
        (False, {"token": False}, r"got token=\.\.\. with pretrained=False"),
        (False, {"cache_dir": "c"}, "or at an https:// .*got cache_dir='c' with pretrained=False"),
        ("w.pth", {"local_files_only": True}, r"got local_files_only=True with 'w\.pth'"),
        ("w.pth", {"revision": "v1"}, r"got revision='v1' with 'w\.pth'"),
        ("https://x/w.pth", {"revision": "v1"}, "got revision='v1' with 'https://x/w.pth'"),
        ("https://x/w.pth", {"token": "secret"}, r"got token=\.\.\. with 'https://x/w.pth'"),
    ],
)
def test_options_of_the_hub_are_refused_elsewhere(pretrained, options, message):
    with pytest.raises(ValueError, match=message):
        find(pretrained, **options)


def test_shipped_weights_lie_in_the_package(file, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_SHIPPED", tmp_path / "shipped")
    folder = tmp_path / "shipped" / "tiny"
    folder.mkdir(parents=True)
    file.rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model": "LongNetLM"}')
    found = find(True, entry_with(published("shipped:tiny")))
    assert torch.equal(found.state_dict["weight"], STATE["weight"])
    assert found.config == {"model": "LongNetLM"}
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    find(True, entry_with(published("shipped:tiny", sha256=digest)), local_files_only=True)
    with pytest.raises(ValueError, match="shipped:tiny"):
        find(True, entry_with(published("shipped:tiny", sha256="0" * 64)))
    with pytest.raises(FileNotFoundError, match="'shipped:other' does not exist"):
        find("shipped:other")
    with pytest.raises(ValueError, match=r"revision is for weights on the Hub .* 'shipped:tiny'"):
        find(True, entry_with(published("shipped:tiny")), revision="main")
