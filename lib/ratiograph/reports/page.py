"""The parts of a page of a report: the page itself, its sections, tables and pictures.

A page is one HTML file that needs no other: styles, script and pictures are in it. Every function returns HTML.
Arguments that are HTML say so: their caller escapes the texts of a run's files.
"""

from __future__ import annotations

import base64
import os
import platform
import time
from collections.abc import Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from xml.parsers import expat

import ratiograph
from ratiograph.core.foreign import read_bytes, shown
from ratiograph.data.images import read_image

__all__ = ["PICTURES", "breakable", "chart_section", "facts_list", "page", "picture", "section", "table", "table_row"]

PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
LARGEST = 2**26
"""Bytes of a picture; in a page they take a third more."""


def page(title: str, eyebrow: str, facts: str, sections: Sequence[str], *, tab: str = "") -> bytes:
    """The whole file, in UTF-8.

    Args:
        title: of the page.
        eyebrow: a word or two above it.
        facts: HTML below it, as of ``facts_list``.
        sections: HTML; "" is left out.
        tab: what the browser's tab is called; ``title`` by default.
    """
    assets = resources.files("ratiograph") / "assets"
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tab or title)}</title>"
        f"<style>{(assets / 'report.css').read_text(encoding='utf-8')}</style></head>"
        f'<body><main><header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1>{facts}</header>\n'
        + "\n".join(part for part in sections if part)
        + f"\n<footer>{escape(_environment())}</footer></main>"
        f"<script>{(assets / 'report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )
    return text.encode(errors="replace")  # JSON may hold halves of surrogate pairs, which UTF-8 has not


def facts_list(facts: dict[str, str]) -> str:
    """Names and values in a row below the title; "" without any."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>' if facts else ""


def section(title: str, body: str, hint: str = "") -> str:
    """A heading, a line of help (HTML), and the body (HTML)."""
    hint = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{hint}{body}</section>"


def breakable(text: str) -> str:
    """A name as HTML that may be broken behind its stops, where a browser would not."""
    return escape(text).replace("/", "/<wbr>").replace(".", ".<wbr>").replace("_", "_<wbr>")


def chart_section(title: str, charts: str, hint: str) -> str:
    """A section of ``charts`` (HTML) side by side; "" without any."""
    return section(title, f'<div class="charts">{charts}</div>', hint) if charts else ""


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[str],
    *,
    kind: str = "numbers",
    head_kinds: Sequence[str] | None = None,
    seen: bool = True,
) -> str:
    """A table that scrolls in itself where it is too wide, by keys too.

    Args:
        caption: text of its caption, which is also read out for the region that scrolls.
        heads: HTML of the head of each column.
        rows: HTML, as of `table_row`.
        kind: classes of report.css for the table.
        head_kinds: the same for each head.
        seen: whether the caption is shown, or only read out.
    """
    unseen = "" if seen else ' class="unseen"'
    head = _cells("th", heads, head_kinds, ' scope="col"')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption{unseen}><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def table_row(head: str, cells: Sequence[str], *, kind: str = "", cell_kinds: Sequence[str] | None = None) -> str:
    """One line of a `table`: its head and its cells in HTML, with classes of report.css for the line and the cells."""
    mark = f' class="{kind}"' if kind else ""
    return f'<tr{mark}><th scope="row">{head}</th>{_cells("td", cells, cell_kinds)}</tr>'


def _cells(tag: str, cells: Sequence[str], kinds: Sequence[str] | None, attributes: str = "") -> str:
    marks = [f' class="{kind}"' if kind else "" for kind in kinds or [""] * len(cells)]
    return "".join(f"<{tag}{attributes}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, cells, strict=True))


def picture(folder: Path, name: str | Path, caption: str, alternative: str) -> str:
    """A file of a run as a figure, its bytes in the page; a sentence for the page where it cannot be shown.

    Args:
        folder: of the run; files that lie elsewhere, by a link too, are not shown.
        name: of the file in it, with an ending of ``PICTURES``.
        caption: HTML below it.
        alternative: what it shows, for those who do not see it.
    """
    try:
        data = _picture_bytes(folder, folder / name)
    except ValueError as error:
        return f'<p class="gaps">{escape(shown(name))} cannot be shown: {escape(str(error))}.</p>'
    address = f"data:{PICTURES[Path(name).suffix.lower()]};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{address}" alt="{escape(alternative)}"><figcaption>{caption}</figcaption></figure>'


def _picture_bytes(folder: Path, path: Path) -> bytes:
    """The bytes of a picture that a browser can draw.

    Raises:
        ValueError: there is none; BadImage: it is damaged or too large.
    """
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    if not inside or path.suffix.lower() not in PICTURES or not os.path.isfile(path):
        raise ValueError("it is no picture in the run's folder")
    data = read_bytes(path, LARGEST)
    if path.suffix.lower() == ".svg":
        _check_drawing(data)
    else:
        read_image(data)
    return data


def _check_drawing(data: bytes) -> None:
    """ValueError for what is no XML, or defines entities, which may multiply without end."""

    def refuse(*entity: object) -> None:
        raise ValueError("it defines entities")

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise ValueError(f"it is not a drawing ({error})") from error


def _environment() -> str:
    versions = []
    for name in ("torch", "numpy"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"Report written {when} by ratiograph {ratiograph.__version__} with {', '.join(versions)} on {system}."
