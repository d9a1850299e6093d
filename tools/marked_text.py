"""Markdown tables, and their place in a file: between the lines <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ratiograph.core.files import write_atomically

__all__ = ["insert", "replaced", "table"]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, left: int | None = None) -> str:
    """A table of ``heads`` over ``rows``; columns after the first ``left`` are aligned right, none by default."""
    left = len(heads) if left is None else left
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (heads, *rows)]
    lines.insert(1, "|" + "---|" * left + "---:|" * (len(heads) - left))
    return "\n".join(lines)


def replaced(path: Path, name: str, text: str) -> str:
    """The text of the file at ``path`` with ``text`` between the markers of ``name``.

    Raises:
        ValueError: there is no such file, or it lacks the markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, opened, rest = old.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{path} has no place for the table: write the lines {start} and {end} where it belongs")
    return f"{before}{start}\n{text}\n{end}{after}"


def insert(path: Path, name: str, text: str) -> None:
    """Writes ``text`` between the markers of ``name`` in the file at ``path``.

    Raises:
        ValueError: there is no such file, or it lacks the markers.
    """
    write_atomically(path, replaced(path, name, text).encode())
