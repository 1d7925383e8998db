"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()
) -> str:
    """Returns a table.

    Args:
        head: Names of the columns.
        rows: A text for each column.
        right: Columns that are set flush right, counted from 0.
    """
    aligned = set(right)
    rule = ["---:" if place in aligned else "---" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
