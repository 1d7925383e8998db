import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from recipes.text_files import PACKAGES, check_pattern, find_files


def _keys(source, **options):
    return [file.key for file in find_files(source, **options)]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a/z.py", "a/y.MD", "a/data.jsonl", "a/image.png", "a/x.f90"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for hidden in (".git/config.txt", "__pycache__/c.py", "a/site-packages/p.py"):
        (tmp_path / hidden).parent.mkdir()
        (tmp_path / hidden).write_text(hidden)
    return tmp_path


def test_the_standard_library_comes_without_packages_and_prose():
    files = find_files("stdlib")
    keys = [file.key for file in files]
    assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= set(keys)
    assert all(key.startswith("stdlib/") and key.endswith(".py") for key in keys)
    assert not [key for key in keys if "-packages/" in key or "pydoc_data/" in key]
    assert keys == [file.key for file in find_files("stdlib")]
    by_key = {file.key: file.path for file in files}
    assert os.path.samefile(by_key["stdlib/os.py"], os.__file__)


def test_python_adds_installed_packages_without_importing_them(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sympy" else find_spec(name)
    )
    monkeypatch.delitem(sys.modules, "networkx", raising=False)
    roots = {key.split("/")[0] for key in _keys("python")}
    assert roots == {"stdlib", *PACKAGES} - {"sympy"}
    assert "networkx" not in sys.modules


def test_a_python_without_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=f"found no .py file in {tmp_path}"):
        find_files("stdlib")


def test_a_folder_is_searched_recursively_in_path_order(folder):
    assert _keys(str(folder)) == ["a/data.jsonl", "a/y.MD", "a/z.py", "b.txt"]


def test_a_pattern_takes_any_suffix(folder):
    assert _keys(str(folder), pattern="**/*.f90") == ["a/x.f90"]
    assert _keys(str(folder), pattern="*.txt") == ["b.txt"]


def test_files_globs_and_lists_are_taken(folder, monkeypatch):
    assert _keys(str(folder / "b.txt")) == ["b.txt"]
    assert _keys(f"{folder}/**/*.py") == ["__pycache__/c.py", "a/site-packages/p.py", "a/z.py"]
    assert _keys([str(folder / "b.txt"), f"{folder}/a/z.*"]) == ["b.txt", "z.py"]
    monkeypatch.chdir(folder)
    assert _keys("a/*.py") == ["z.py"]
    assert _keys("*.txt") == ["b.txt"]
    monkeypatch.setenv("HOME", str(folder))
    assert _keys("~/b.t?t") == ["b.txt"]


def test_a_name_with_brackets_that_exists_is_no_glob(tmp_path):
    (tmp_path / "part[1].txt").write_text("x")
    assert _keys(str(tmp_path / "part[1].txt")) == ["part[1].txt"]


def test_only_the_suffix_decides_about_rows(folder):
    tables = {file.key: file.is_table for file in find_files(str(folder))}
    assert [key for key, is_table in tables.items() if is_table] == ["a/data.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "source must name at least one place, got \\[\\]"),
        (
            "nowhere",
            "source must exist, got 'nowhere', which is no file, folder or glob .seen from",
        ),
        ("nowhere/*.txt", "match at least one file, got the glob 'nowhere/\\*.txt': none"),
        ("a/image.png", "source='a/image.png' names .* not known: \\['.png'\\]; known are .jsonl"),
        ("a/x.*", "source='a/x.\\*' names .* not known: \\['.f90'\\].* pattern='\\*.suffix'"),
        ("a/site-packages/empty", "got 'a/site-packages/empty', where none matches the suffixes"),
    ],
)
def test_bad_sources_are_errors(folder, monkeypatch, source, message):
    monkeypatch.chdir(folder)
    Path("a/site-packages/empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_files(source)


def test_a_pattern_without_match_is_an_error(folder):
    with pytest.raises(ValueError, match=f"got '{folder}', where none matches pattern='.*.xyz'"):
        find_files(str(folder), pattern="**/*.xyz")


@pytest.mark.parametrize("pattern", ["", "/etc/*.txt", "../*.txt"])
def test_a_pattern_that_is_not_below_the_folder_is_an_error(folder, pattern):
    with pytest.raises(
        ValueError, match=rf"to the folder '.*', got pattern={re.escape(repr(pattern))}: "
    ):
        find_files(str(folder / "a"), pattern=pattern)


def test_a_pattern_without_folder_is_an_error(folder):
    with pytest.raises(ValueError, match=r"got pattern='\*.py' and no folder among \['stdlib'\]"):
        check_pattern("*.py", ["stdlib"])
    check_pattern("*.py", ["stdlib", [str(folder)]])
    check_pattern(None, ["stdlib"])


@pytest.mark.parametrize("pattern", [None, "*.txt"])
def test_an_unreadable_folder_is_an_error(folder, monkeypatch, pattern):
    # Permissions would not stop the superuser, who runs most containers.
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=f"readable, got the folder '{folder}': Permission denied"):
        find_files(str(folder), pattern=pattern)


def test_an_unreadable_folder_further_down_is_skipped_and_reported(folder, monkeypatch, caplog):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert _keys(str(folder)) == ["b.txt"]
    assert f"skipped the folder {folder}/a: Permission denied" in caplog.text
