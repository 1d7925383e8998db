"""The Python of every page runs as a reader would type it, and prints what the page shows."""

import shlex
import sys
from pathlib import Path

import pytest

from longnet_zoo import registry
from tests.forked import fork_ranks
from tests.markdown import check_printed, read_blocks, run_programme, run_session

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TUTORIALS = ("images_and_text", "scaling_out", "slides", "text", "your_own_model")
PAGES = (
    "index",
    "patterns",
    "rules",
    "transformers",
    "zoo",
    *(f"tutorials/{name}" for name in TUTORIALS),
)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """An empty folder, and a process that a session leaves as it found it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["python"])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_and_print_what_is_shown(page, session):
    blocks = read_blocks((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert any(block.language == "python" for block in blocks)
    run_session(DOCS / f"{page}.md")


def test_all_tutorials_are_run():
    assert {path.stem for path in (DOCS / "tutorials").glob("*.md")} == set(TUTORIALS)


@pytest.mark.distributed
def test_the_programme_for_two_processes_prints_what_is_shown(tmp_path):
    blocks = read_blocks((DOCS / "tutorials" / "scaling_out.md").read_text(encoding="utf-8"))
    (programme,) = (block for block in blocks if block.title == "train.py")
    place = next(i for i, block in enumerate(blocks) if block.text.startswith("torchrun"))
    options = shlex.split(blocks[place].text)
    assert options == ["torchrun", "--standalone", "--nproc-per-node", "2", "train.py"]
    ended = fork_ranks(tmp_path, run_programme, programme.text, world_size=2)
    assert [process.status for process in ended] == [0, 0], ended
    said = "".join(process.said for process in ended)
    lines = [line for line in said.splitlines() if "tokens here" in line]
    check_printed("\n".join(lines), blocks[place + 1].text, place="train.py")
