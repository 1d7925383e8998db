"""The site is built without a warning, has every public name, and needs no network to be read."""

import importlib
import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="MkDocs, which builds the site, is not installed")

from mkdocs.commands.build import build
from mkdocs.config import load_config

from docs.hooks import on_page_markdown

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
# What the reference must have; it may have more.
PACKAGES = {
    "longnet_zoo",
    "longnet_zoo.interop.transformers",
    "longnet_zoo.layers",
    "longnet_zoo.long_range",
    "longnet_zoo.models",
    "longnet_zoo.ops",
    "longnet_zoo.parallel",
    "longnet_zoo.text",
    "longnet_zoo.tokenizers",
}


def package_of(page):
    (package,) = re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.MULTILINE)
    return package


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.chdir(ROOT)
        build(load_config("mkdocs.yml", strict=True, site_dir=str(folder)))
    return folder


def test_the_reference_has_the_public_packages():
    assert set(map(package_of, REFERENCE)) >= PACKAGES


def test_a_new_public_name_appears_by_itself(monkeypatch):
    import longnet_zoo.text

    def new_name() -> None:
        """Does nothing."""

    monkeypatch.setattr(longnet_zoo.text, "new_name", new_name, raising=False)
    monkeypatch.setattr(longnet_zoo.text, "NEW_SIZE", 5, raising=False)
    monkeypatch.setattr(longnet_zoo.text, "__all__", ["NEW_SIZE", "new_name"])
    written = on_page_markdown("# Title\n\n::: longnet_zoo.text\n")
    assert "::: longnet_zoo.text.new_name\n" in written
    assert "{ #longnet_zoo.text.NEW_SIZE }" in written
    assert "NEW_SIZE = 5" in written


def test_a_function_named_as_its_module_is_found():
    written = on_page_markdown("::: longnet_zoo\n")
    assert "::: longnet_zoo.ops.dilated_attention.dilated_attention\n" in written


@pytest.mark.slow
@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_every_public_name_is_in_the_reference(page, site):
    package = package_of(page)
    html = (site / "reference" / f"{page.stem}.html").read_text(encoding="utf-8")
    module = importlib.import_module(package)
    missing = [name for name in module.__all__ if f'id="{package}.{name}"' not in html]
    assert not missing
    assert all(f"{name}" in html for name in module.__all__)


@pytest.mark.slow
def test_arguments_are_in_tables(site):
    html = (site / "reference" / "index.html").read_text(encoding="utf-8")
    section = html[html.index('id="longnet_zoo.create_model"') :]
    words = " ".join(re.sub(r"<[^>]+>", " ", section[: section.index("<h2")]).split())
    assert "Parameters:" in words
    assert "cache_dir" in words
    assert "Folder for what is downloaded" in words
    assert "Raises:" in words


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]+)"', html)
        assert not [x for x in loaded if re.match(r"(https?:)?//", x)], path.name
        missing = [x for x in loaded if not (path.parent / x.partition("?")[0]).exists()]
        assert not [x for x in missing if not x.startswith(("data:", "/"))], path.name


@pytest.mark.slow
def test_nothing_but_pages_is_published(site):
    assert not [path.name for path in site.rglob("*") if path.suffix in (".py", ".pyc", ".md")]
