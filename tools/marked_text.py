"""The place of a text in a file: between the lines <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

from pathlib import Path

from ratiograph.core.files import write_atomically
from ratiograph.core.foreign import read_text, shown

__all__ = ["insert", "replaced"]


def replaced(path: Path, name: str, text: str) -> str:
    """The text of the file at ``path`` with ``text`` between the markers of ``name``.

    Raises:
        ValueError: there is no such file, it cannot be read, or it lacks the markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = read_text(path) if path.is_file() else ""
    before, opened, rest = old.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(
            f"{shown(path)} has no place for the table: write the lines {start} and {end} where it belongs"
        )
    return f"{before}{start}\n{text}\n{end}{after}"


def insert(path: Path, name: str, text: str) -> None:
    """Writes ``text`` between the markers of ``name`` in the file at ``path``.

    Raises:
        ValueError: there is no such file, it cannot be read, or it lacks the markers.
    """
    write_atomically(path, replaced(path, name, text).encode())
