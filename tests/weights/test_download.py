import hashlib
import logging

import pytest
import torch
from huggingface_hub import constants

from longnet_zoo.weights.download import DownloadOptions, check_digest, download_url
from tests.weights.servers import serve

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with serve() as server:
        server.files["/a/w.pth"] = CONTENT
        server.files["/b/w.pth"] = b"other"
        yield server


def test_file_is_downloaded_once_and_kept(tmp_path):
    options = DownloadOptions(cache_dir=tmp_path / "cache")
    with serve() as server:
        server.files["/a/w.pth"] = CONTENT
        path = download_url(f"{server.url}/a/w.pth", options)
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".pth"
    assert list(path.parent.iterdir()) == [path]
    # The server is gone by now.
    assert download_url(f"{server.url}/a/w.pth", options) == path
    offline = DownloadOptions(cache_dir=tmp_path / "cache", local_files_only=True)
    assert download_url(f"{server.url}/a/w.pth", offline) == path
    assert server.requests == [("GET", "/a/w.pth")]


def test_files_of_one_name_do_not_meet(server, tmp_path):
    options = DownloadOptions(cache_dir=tmp_path)
    for place, content in (("a", CONTENT), ("b", b"other")):
        assert download_url(f"{server.url}/{place}/w.pth", options).read_bytes() == content


def test_cache_is_that_of_torch_hub_unless_another_is_given(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = download_url(f"{server.url}/a/w.pth", DownloadOptions())
    assert path.parent == tmp_path / "hub" / "checkpoints"
    monkeypatch.setenv("HOME", str(tmp_path))
    path = download_url(f"{server.url}/a/w.pth", DownloadOptions(cache_dir="~/mine"))
    assert path.parent == tmp_path / "mine"


def test_download_that_breaks_off_leaves_nothing(server, tmp_path):
    server.cut.add("/a/w.pth")
    options = DownloadOptions(cache_dir=tmp_path)
    with pytest.raises(ConnectionError, match=r"/a/w\.pth .*got 5120 of 10240 bytes.* by hand"):
        download_url(f"{server.url}/a/w.pth", options)
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_not_there_is_one_clear_error(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot download .*/gone\.pth .*404.* by hand"):
        download_url(f"{server.url}/gone.pth", DownloadOptions(cache_dir=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_network_is_not_touched_when_it_must_not_be(how, server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    options = DownloadOptions(cache_dir=tmp_path, local_files_only=how == "argument")
    message = f"local_files_only={how == 'argument'} and HF_HUB_OFFLINE={how == 'environment'}"
    with pytest.raises(FileNotFoundError, match=message):
        download_url(f"{server.url}/a/w.pth", options)
    assert server.requests == []


def test_digest_is_compared(tmp_path, caplog):
    path = tmp_path / "w.pth"
    path.write_bytes(CONTENT)
    with caplog.at_level(logging.INFO):
        check_digest(path, SHA256.upper(), source="it")
    assert caplog.messages == []
    with pytest.raises(ValueError, match=f"it must have SHA-256 {'0' * 64}, got {SHA256} in .*w.p"):
        check_digest(path, "0" * 64, source="it")


def test_digest_that_nobody_states_is_logged(tmp_path, caplog):
    path = tmp_path / "w.pth"
    path.write_bytes(CONTENT)
    with caplog.at_level(logging.INFO):
        check_digest(path, None, source="it")
    assert caplog.messages == [
        f"it has SHA-256 {SHA256}; its publisher states none to compare with"
    ]
