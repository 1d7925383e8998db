"""What runs the pages notices a page that says something else."""

import pytest

from tests.markdown import check_printed, links, read_blocks, run_session

PAGE = """# Title

See [a](there.md#part), [b](https://example.org) and ![c](images/c.png).

```python
x = 2
```

```python title="saved.py"
y = [a](not/a.link)
```

```python
print(f"{x} rows, {x / 3:.3f}")
```

```text
2 rows, 0.667
```
"""


def run(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "page.md"
    path.write_text(page)
    return run_session(path)


def test_blocks_are_read_with_language_title_and_line():
    assert [(x.language, x.title, x.line) for x in read_blocks(PAGE)] == [
        ("python", None, 5),
        ("python", "saved.py", 9),
        ("python", None, 13),
        ("text", None, 17),
    ]


def test_a_session_shares_names_and_saves_files(tmp_path, monkeypatch):
    assert run(tmp_path, monkeypatch, PAGE)["x"] == 2
    assert (tmp_path / "saved.py").read_text() == "y = [a](not/a.link)\n"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("2 rows", "3 rows"), ("0.667", "0.5"), ("rows", "lines"), ("2 rows, 0.667\n", "")],
)
def test_a_page_that_shows_something_else_fails(tmp_path, monkeypatch, right, wrong):
    start, end = PAGE.split("```text")
    with pytest.raises(AssertionError, match=r"page.md, line 13 prints\n2 rows, 0.667"):
        run(tmp_path, monkeypatch, f"{start}```text{end.replace(right, wrong)}")


def test_what_is_printed_must_be_shown(tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="line 13 prints"):
        run(tmp_path, monkeypatch, PAGE.split("```text")[0])


def test_the_last_digits_of_numbers_may_differ():
    check_printed("loss 1.234, 5 steps\n", "loss 1.250, 5 steps", place="here")
    with pytest.raises(AssertionError, match="here prints"):
        check_printed("loss 1.234, 5 steps\n", "loss 1.234, 6 steps", place="here")


def test_links_are_those_of_the_text_without_addresses():
    assert links(PAGE) == ["there.md", "images/c.png"]
