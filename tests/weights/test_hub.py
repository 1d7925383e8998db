"""Downloads from a small Hub on this machine, by processes that know no other one."""

import json
import os
import queue
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from longnet_zoo.factory import create_model
from longnet_zoo.weights.download import DownloadOptions
from longnet_zoo.weights.hub import cached_sha256, download_hub, parse_hub_location
from tests.weights.servers import GOOD_TOKEN, Repository, commit_of, serve

pytestmark = pytest.mark.timeout(120)

SMALL = {
    "vocab_size": 61,
    "embed_dim": 24,
    "num_layers": 1,
    "num_heads": 4,
    "segment_lengths": (7, 16),
    "dilation_rates": (1, 3),
}
# What tells this model from the one of the name that it is loaded under.
SIZES = {"embed_dim": 24, "num_layers": 1}
# Reads one call a line and answers with the model's sum of weights and config, or the error.
WORKER = """
import dataclasses, json, logging, sys
import longnet_zoo
from longnet_zoo.models import LongNetLM

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("longnet_zoo").addHandler(handler)
logging.getLogger("longnet_zoo").setLevel(logging.INFO)
for line in sys.stdin:
    call = json.loads(line)
    messages.clear()
    try:
        if "from_pretrained" in call:
            model = LongNetLM.from_pretrained(call.pop("from_pretrained"), **call)
        else:
            model = longnet_zoo.create_model("longnet_lm_tiny", **call)
        answer = {"sum": sum(x.double().sum().item() for x in model.state_dict().values())}
        answer |= {"config": dataclasses.asdict(model.config), "log": list(messages)}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


@contextmanager
def client(url, cache, **environment):
    """A function that calls `create_model` in another process, whose Hub is at `url`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        cwd=Path(__file__).parents[2],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": url,
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    answers = queue.Queue()

    def read():
        for line in process.stdout:
            answers.put(line)

    threading.Thread(target=read, daemon=True).start()

    def call(pretrained, **options):
        key = "from_pretrained" if options.pop("by_class", False) else "pretrained"
        process.stdin.write(json.dumps({key: pretrained, **options}) + "\n")
        process.stdin.flush()
        return json.loads(answers.get(timeout=60))

    try:
        yield call
    finally:
        process.kill()
        process.communicate()


def make_weights(seed):
    torch.manual_seed(seed)
    return create_model("longnet_lm_tiny", **SMALL).state_dict()


def sum_of(state_dict):
    return sum(x.double().sum().item() for x in state_dict.values())


OLD, NEW = make_weights(1), make_weights(2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub, and a process that uses it and a cache of its own."""
    folder = tmp_path_factory.mktemp("hub")
    model = create_model("longnet_lm_tiny", **SMALL)
    model.load_state_dict(NEW)
    model.save_pretrained(folder / "saved")
    saved = {path.name: path.read_bytes() for path in (folder / "saved").iterdir()}
    torch.save({"model": OLD}, folder / "w.bin")
    with serve() as server:
        server.repositories = {
            "ours/saved": Repository({"main": saved}),
            "ours/files": Repository(
                {
                    "main": {"sub/w.safetensors": save(NEW)},
                    "v1": {"sub/w.safetensors": save(OLD)},
                }
            ),
            "ours/bin": Repository(
                {"main": {"pytorch_model.bin": (folder / "w.bin").read_bytes()}}
            ),
            "ours/empty": Repository({"main": {"README.md": b"words"}}),
            "ours/gated": Repository({"main": {"w.safetensors": save(NEW)}}, is_gated=True),
            "ours/other": Repository(
                {"main": {"config.json": b'{"architecture": "vit"}', "w.safetensors": save(NEW)}}
            ),
            "ours/damaged": Repository(
                {"main": {"w.safetensors": save(NEW)}}, wrong_sha256={"w.safetensors"}
            ),
        }
        with client(server.url, folder / "cache") as call:
            yield server, call, folder / "cache"


def test_repository_brings_its_config_and_the_user_wins(world):
    _, call, _ = world
    answer = call("hf_hub:ours/saved", dropout=0.5, **SIZES)
    assert answer["sum"] == sum_of(NEW)
    assert answer["config"]["embed_dim"] == 24
    assert answer["config"]["dropout"] == 0.5
    assert answer["log"] == []  # the Hub states a digest, and it was compared
    # As the file beside the config does.
    answer = call("hf_hub:ours/saved/model.safetensors", **SIZES)
    assert answer["config"]["vocab_size"] == 61


def test_file_is_downloaded_once(world):
    server, call, _ = world
    server.requests.clear()
    for _ in range(2):
        assert call("hf_hub:ours/files/sub/w.safetensors", **SMALL)["sum"] == sum_of(NEW)
    methods = [method for method, _ in server.requests]
    assert methods.count("GET") == 1


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("hf_hub:ours/files@v1/sub/w.safetensors", {}),
        ("hf_hub:ours/files/sub/w.safetensors", {"revision": "v1"}),
        ("hf_hub:ours/files/sub/w.safetensors", {"revision": commit_of("ours/files", "v1")}),
        ("hf_hub:ours/bin", {}),
    ],
)
def test_revision_and_file_are_the_ones_asked_for(place, options, world):
    _, call, _ = world
    assert call(place, **options, **SMALL)["sum"] == sum_of(OLD)


def test_cache_dir_and_token_are_used(world, tmp_path):
    _, call, _ = world
    place = "hf_hub:ours/gated/w.safetensors"
    answer = call(place, cache_dir=str(tmp_path), token=GOOD_TOKEN, **SMALL)
    assert answer["sum"] == sum_of(NEW)
    assert (tmp_path / "models--ours--gated").is_dir()


@pytest.mark.parametrize(
    ("place", "options", "error", "words"),
    [
        (
            "hf_hub:ours/gated/w.safetensors",
            {},
            "PermissionError",
            [
                "hf_hub:ours/gated is gated",
                "/ours/gated",
                "token=",
                "download w.safetensors by hand",
            ],
        ),
        (
            "hf_hub:ours/gated/w.safetensors",
            {"token": "hf_bad"},
            "PermissionError",
            ["hf_hub:ours/gated is gated"],
        ),
        (
            "hf_hub:ours/gone/w.safetensors",
            {},
            "FileNotFoundError",
            ["hf_hub:ours/gone: the Hub has no such repository, or it is private"],
        ),
        (
            "hf_hub:ours/files@v9/sub/w.safetensors",
            {},
            "FileNotFoundError",
            ["hf_hub:ours/files@v9: the repository has no revision 'v9'"],
        ),
        (
            "hf_hub:ours/files/gone.safetensors",
            {},
            "FileNotFoundError",
            ["hf_hub:ours/files has no gone.safetensors. Name the file that it has"],
        ),
        (
            "hf_hub:ours/empty",
            {},
            "FileNotFoundError",
            ["has no model.safetensors and no pytorch_model.bin", "/ours/empty/tree/main"],
        ),
        (
            "hf_hub:ours/files/sub/w.safetensors",
            {"local_files_only": True, "revision": "main", "cache_dir": "EMPTY"},
            "FileNotFoundError",
            ["sub/w.safetensors is not in the cache", "is turned off", "local_files_only=True"],
        ),
        (
            "hf_hub:ours/damaged/w.safetensors",
            {},
            "ValueError",
            ["'hf_hub:ours/damaged/w.safetensors' must have SHA-256 ", "delete it"],
        ),
        (
            "hf_hub:ours/files/README.md",
            {},
            "ValueError",
            ["ending in ('.safetensors', ", "got 'README.md'"],
        ),
    ],
)
def test_what_cannot_be_had_is_one_clear_error(place, options, error, words, world, tmp_path):
    _, call, _ = world
    if "cache_dir" in options:
        options = {**options, "cache_dir": str(tmp_path)}
    answer = call(place, **options, **SMALL)
    assert answer.get("error") == error, answer
    for part in words:
        assert part in answer["message"]


def test_config_of_another_library_is_refused(world):
    server, call, _ = world
    other = server.repositories["ours/other"].files["main"]
    other["model.safetensors"] = other["w.safetensors"]
    answer = call("hf_hub:ours/other", **SMALL)
    assert answer["error"] == "ValueError"
    assert "config.json must be one of LongNetLM, got model=None" in answer["message"]
    # The cure that the message names.
    assert call("hf_hub:ours/other/model.safetensors", **SMALL)["sum"] == sum_of(NEW)


def test_from_pretrained_reads_the_hub_and_tells_its_errors(world):
    _, call, _ = world
    answer = call("ours/saved", by_class=True, num_outputs=None)
    assert answer["sum"] == sum_of(NEW)
    assert call("ours/gated", by_class=True)["error"] == "GatedRepoError"
    assert "config.json" in call("ours/empty", by_class=True)["message"]


@pytest.mark.parametrize("how", ["offline", "server gone"])
def test_cached_weights_need_no_network(how, world):
    server, call, cache = world
    places = ["hf_hub:ours/saved", "hf_hub:ours/files/sub/w.safetensors", "hf_hub:ours/bin"]
    for place in places:
        call(place, **(SIZES if "saved" in place else SMALL))
    server.requests.clear()
    environment = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {}
    url = server.url if how == "offline" else "http://127.0.0.1:9"  # nobody listens there
    with client(url, cache, **environment) as call_again:
        assert call_again(places[0], **SIZES)["sum"] == sum_of(NEW)
        assert call_again(places[1], **SMALL)["sum"] == sum_of(NEW)
        if how == "offline":
            # The Hub had said that this one has neither config.json nor model.safetensors.
            assert call_again(places[2], **SMALL)["sum"] == sum_of(OLD)
            answer = call_again("hf_hub:ours/files@v7/sub/w.safetensors", **SMALL)
            assert answer["error"] == "FileNotFoundError"
            assert "HF_HUB_OFFLINE=True" in answer["message"]
    assert server.requests == []


@pytest.mark.parametrize(
    "text", ["hf_hub:", "hf_hub:name", "hf_hub:a/b/", "hf_hub:a/b@", "hf_hub:a /b"]
)
def test_place_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match=f"must be 'hf_hub:owner/name.*got '{text}'"):
        parse_hub_location(text)


def test_two_revisions_are_refused():
    with pytest.raises(ValueError, match="revision='v2' and 'hf_hub:a/b@v1'"):
        parse_hub_location("hf_hub:a/b@v1", "v2")
    location = parse_hub_location("hf_hub:a/b@v1/c/d.bin", "v1")
    assert (location.repo_id, location.revision, location.filename) == ("a/b", "v1", "c/d.bin")


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_other_failures_are_connection_errors(kind, monkeypatch):
    def fail(*args, **options):
        raise kind("the line is dead\nmore")

    monkeypatch.setattr("longnet_zoo.weights.hub.hf_hub_download", fail)
    with pytest.raises(ConnectionError, match=f"w.bin of hf_hub:a/b: {kind.__name__}: the line"):
        download_hub(parse_hub_location("hf_hub:a/b"), "w.bin", DownloadOptions())


def test_wrong_name_of_a_repository_keeps_its_own_error():
    with pytest.raises(ValueError, match=r"'a/b\.\.c'"):
        download_hub(parse_hub_location("hf_hub:a/b..c"), "w.bin", DownloadOptions())


def test_sha256_is_read_from_the_first_link_only(tmp_path):
    blob, store = tmp_path / ("a" * 64), tmp_path / ("b" * 64)
    store.touch()
    blob.symlink_to(store)
    (tmp_path / "w.bin").symlink_to(blob)
    assert cached_sha256(tmp_path / "w.bin") == "a" * 64
    (tmp_path / "small.json").symlink_to(tmp_path / ("c" * 40))
    assert cached_sha256(tmp_path / "small.json") is None
    save_file(NEW, tmp_path / "copy.safetensors")
    assert cached_sha256(tmp_path / "copy.safetensors") is None
