"""Reads a page of Markdown as its reader does: runs its blocks, checks prints and links."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# Of a printed number that is no integer: other versions and processors round elsewhere.
_RELATIVE_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, the file that it is to be saved as, its text and its line."""

    language: str
    title: str | None
    text: str
    line: int


def read_blocks(page: str) -> list[Block]:
    """Finds the fenced blocks of a page, in order."""
    return [
        Block(
            language=found[1],
            title=found[2],
            text=found[3],
            line=page.count("\n", 0, found.start()) + 1,
        )
        for found in _BLOCK.finditer(page)
    ]


def run_session(path: Path) -> dict[str, Any]:
    """Runs the Python blocks of a page in order, as one session, in the working folder.

    A block with a title is saved under it. What a block prints must be the `text` block behind it.

    Returns:
        The names that the session leaves.
    """
    blocks = read_blocks(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            place = f"{path.name}, line {block.line}"
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.text, place, "exec"), namespace)
            is_shown = following is not None and following.language == "text"
            check_printed(printed.getvalue(), following.text if is_shown else "", place=place)
    return namespace


def run_programme(text: str) -> None:
    """Runs a block that is a programme of its own."""
    exec(compile(text, "programme", "exec"), {"__name__": "__main__"})


def check_printed(got: str, shown: str, *, place: str) -> None:
    """Fails unless what was printed is what a page shows, up to the last digits of numbers."""
    lines = [[line.rstrip() for line in text.strip().splitlines()] for text in (got, shown)]
    words = [[" ".join(_NUMBER.sub("#", line).split()) for line in own] for own in lines]
    numbers = [[x for line in own for x in _NUMBER.findall(line)] for own in lines]
    is_same = words[0] == words[1] and all(map(_is_near, *numbers))
    assert is_same, f"{place} prints\n{got}\nand the page shows\n{shown}"


def _is_near(got: str, shown: str) -> bool:
    if not any(mark in got + shown for mark in ".e"):
        return got == shown
    first, second = (float(x.replace(",", "")) for x in (got, shown))
    return first == pytest.approx(second, rel=_RELATIVE_TOLERANCE)


def links(page: str) -> list[str]:
    """Lists the targets of links and pictures that are no addresses, without their anchors."""
    prose = _BLOCK.sub("", page)
    return [x for x in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose) if x]
