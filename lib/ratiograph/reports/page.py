"""What the pages of a report are put together from: the page, its sections, tables that scroll, and pictures in it.

A page is one HTML file that needs no other: styles, script and pictures are in it. The functions return HTML; texts
that come from a run's files are escaped by whoever puts them in, and ``body`` and ``caption`` are HTML already.
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

import ratiograph

__all__ = ["PICTURES", "breakable", "captioned", "facts_list", "page", "picture", "scrolled", "section"]

PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}


def page(title: str, eyebrow: str, facts: str, sections: Sequence[str], *, tab: str = "") -> str:
    """The whole file.

    Args:
        title: of the page.
        eyebrow: a word or two above it.
        facts: HTML below it, as of ``facts_list``.
        sections: HTML; "" is left out.
        tab: what the browser's tab is called; ``title`` by default.
    """
    assets = resources.files("ratiograph") / "assets"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tab or title)}</title>"
        f"<style>{(assets / 'report.css').read_text(encoding='utf-8')}</style></head>"
        f'<body><main><header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1>{facts}</header>\n'
        + "\n".join(part for part in sections if part)
        + f"\n<footer>{escape(_environment())}</footer></main>"
        f"<script>{(assets / 'report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def facts_list(facts: dict[str, str]) -> str:
    """Names and values in a row below the title; "" without any."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>' if facts else ""


def section(title: str, body: str, hint: str = "") -> str:
    """A heading, a line of help, and the body."""
    hint = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{hint}{body}</section>"


def breakable(text: str) -> str:
    """A name as HTML that may be broken behind its stops, where a browser would not."""
    return escape(text).replace("/", "/<wbr>").replace(".", ".<wbr>").replace("_", "_<wbr>")


def captioned(text: str, *, seen: bool = True) -> str:
    """The caption of a table; one that is not ``seen`` is only read out."""
    kind = "" if seen else ' class="unseen"'
    return f"<caption{kind}><span>{escape(text)}</span></caption>"


def scrolled(table: str, label: str) -> str:
    """A table that scrolls in itself where it is too wide, by keys too; ``label`` is what is read out for it."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def picture(path: Path, caption: str, alternative: str) -> str:
    """A file as a figure, its bytes in the page.

    Args:
        path: with an ending of ``PICTURES``.
        caption: HTML below it.
        alternative: what it shows, for those who do not see it.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    address = f"data:{PICTURES[path.suffix.lower()]};base64,{data}"
    return f'<figure><img src="{address}" alt="{escape(alternative)}"><figcaption>{caption}</figcaption></figure>'


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
