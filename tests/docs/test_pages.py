"""Pages can be found, lead to what exists, and name commands that can be typed."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from longnet_zoo.cli import _make_parser
from tests.markdown import links, read_blocks

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [path.relative_to(DOCS).as_posix() for path in PAGES]
PICTURES = [*(DOCS / "images").glob("*.png"), *(ROOT / "benchmarks" / "results").rglob("*.png")]


def read(path):
    return path.read_text(encoding="utf-8")


def commands():
    """Every line of the shell blocks, with its page."""
    for path in PAGES:
        for block in read_blocks(read(path)):
            if block.language == "sh":
                for line in block.text.splitlines():
                    yield pytest.param(path, line, id=f"{path.stem}-{line[:40]}")


def pages_of(nav):
    """The files that a part of the navigation leads to."""
    values = nav.values() if isinstance(nav, dict) else nav
    for value in values:
        yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_navigation_has_every_page_once():
    nav = yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"]
    assert sorted(pages_of(nav)) == sorted(NAMES)
    assert len(NAMES) >= 20


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_to_files(path):
    missing = [link for link in links(read(path)) if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_files_that_are_named_exist(path):
    named = re.findall(r"\b(?:configs|recipes)/[\w/.]*\w", read(path))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_blocks_of_python_are_python(path):
    for block in read_blocks(read(path)):
        if block.language in ("python", "py"):
            compile(block.text, f"{path.name}, line {block.line}", "exec")


@pytest.mark.parametrize(("path", "line"), list(commands()))
def test_commands_can_be_typed(path, line, capsys, monkeypatch):
    words = shlex.split(line)
    if words[0] == "longnet-zoo":
        _make_parser().parse_args(words[1:])
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        programme = importlib.import_module(words[2])
        if len(words) > 3:
            programme.read_options(words[3:])
        else:
            assert programme.main
    elif words[:2] == ["python", "-m"]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", ["python"])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(words[2]).main([*words[3:], "--print_config"])
        assert stop.value.code == 0, capsys.readouterr().err
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", read(ROOT / "Makefile"), flags=re.MULTILINE)
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).exists()
    elif words[0] == "torchrun":
        assert words[-1] in [block.title for block in read_blocks(read(path))]
    else:
        assert line == "pip install ."


def test_the_gallery_shows_every_picture():
    shown = [(DOCS / link).resolve() for link in links(read(DOCS / "gallery.md"))]
    assert not [path for path in PICTURES if path not in shown]
    assert len(PICTURES) >= 10


def test_commands_of_the_gallery_make_pictures_of_these_names():
    page = read(DOCS / "gallery.md")
    made = re.findall(r"plot-pattern .* --output (\S+)", page)
    assert sorted(made) == sorted(path.name for path in PICTURES if "pattern" in path.name)
