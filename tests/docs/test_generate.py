"""What pages say of the library is what the library says."""

import re
from itertools import pairwise

import pytest

from docs import generate
from docs.generate import DOCS, GENERATORS, choose_pattern, main, write_page
from longnet_zoo.factory import list_models, model_info
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.registry import find_model

PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if "<!-- generated:" in path.read_text(encoding="utf-8")
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_fresh(name):
    assert write_page(PAGES[name]) == PAGES[name], "run `python -m docs.generate`"


def test_every_generator_has_a_place():
    places = [x for page in PAGES.values() for x in re.findall(r"<!-- generated: (\w+) -->", page)]
    assert sorted(places) == sorted(GENERATORS)


def test_main_fills_places_and_leaves_the_rest(tmp_path, monkeypatch):
    page = tmp_path / "folder" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- generated: reach -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    main()
    written = page.read_text()
    assert written.startswith("before\n<!-- generated: reach -->\n\n| segment length |")
    assert written.endswith("|\n\n<!-- end -->\nafter\n")
    assert "old" not in written


def test_the_zoo_names_every_model_with_its_size():
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]* \| ([\d.]+[KMG]) \|", PAGES["zoo.md"], flags=re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == list_models()
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    for name, size in rows[::8]:
        exact = model_info(name).num_params
        assert float(size[:-1]) * units[size[-1]] == pytest.approx(exact, rel=0.006)


def test_the_zoo_names_all_weights_with_their_licence():
    for name in list_models(pretrained=True):
        for weights in find_model(name).weights:
            assert f"| `{name}` | `{weights.tag}` | " in PAGES["zoo.md"]
            assert weights.licence in PAGES["zoo.md"]


@pytest.mark.parametrize("power", range(11, 21))
def test_patterns_follow_the_rule_of_thumb(power):
    seq_len = 2**power
    pattern = choose_pattern(seq_len)
    assert pattern.branches[0] == (2048, 1)
    assert pattern.segment_lengths[-1] == seq_len
    assert pattern.is_nested
    assert {length // rate for length, rate in pattern.branches} == {2048}
    steps = [b // a for a, b in pairwise(pattern.dilation_rates)]
    if seq_len <= 32_768:
        assert set(steps) <= {2}
    else:
        assert set(steps) <= {2, 4}
        assert steps.count(2) <= 1


def test_the_table_of_lengths_counts_pairs():
    pattern = DilatedPattern(segment_lengths=(2048, 4096), dilation_rates=(1, 2))
    pairs = pattern.attended_pairs(4096, 2, is_causal=True) / 2
    row = next(x for x in PAGES["patterns.md"].splitlines() if x.startswith("| 4,096 |"))
    assert f"| {pairs / 4096:,.0f} | {pairs / (4096 * 4097 / 2):.2g} |" in row


def test_the_table_of_reach_counts_rows():
    lines = PAGES["patterns.md"].splitlines()
    row = next(x for x in lines if x.startswith("| 65,536 | 32 |")).split(" | ")
    assert row[2:6] == ["2,048", "65,535", f"{1 / 32:.3g}", f"{12 / 32:.3g}"]
