"""Text and JSON that somebody else wrote: read within limits, and shown so that a terminal or a page is not fooled.

Other programs begin files with a byte-order mark, end lines in CR LF, and put separators into captions that
``str.splitlines`` would cut at; hostile ones nest JSON thousands deep or send escape sequences to the terminal.
"""

from __future__ import annotations

import json
from pathlib import Path

from ratiograph.core.files import Missing

__all__ = ["LARGEST_TEXT", "lines_of", "parse_json", "read_bytes", "read_json", "read_text", "shown", "text_of"]

LARGEST_TEXT = 2**28
"""Bytes of a text or JSON file; COCO's captions of 2014 take 66 MB, the largest that a run reads."""


def shown(foreign: object, most: int = 200) -> str:
    """Foreign text for a message: on one line, without control characters, at most ``most`` characters long."""
    text = str(foreign)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[: most - 1]}…"


def text_of(data: bytes, source: object) -> str:
    """UTF-8 ``data`` as text, without a byte-order mark and with every line ended by \\n.

    Args:
        data: the bytes.
        source: what they are of, for the error.

    Raises:
        ValueError: the bytes are no UTF-8.
    """
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{shown(source)} is no UTF-8 text ({place}): save it as UTF-8") from error


def read_text(path: Path | str, most: int = LARGEST_TEXT) -> str:
    """The text of a file, see `text_of`.

    Raises:
        Missing: there is no such file.
        ValueError: it is no UTF-8, holds more than ``most`` bytes, or cannot be read; the message names it.
    """
    return text_of(read_bytes(path, most), path)


def lines_of(text: str) -> list[str]:
    """The lines of a text, cut at \\n alone: U+2028, U+0085 and form feeds are characters of a caption."""
    return text.removesuffix("\n").split("\n") if text else []


def parse_json(data: bytes | str, source: object) -> object:
    """The value of a JSON text that came from ``source``.

    Raises:
        ValueError: it is no JSON, or nested too deep; the message names ``source``.
    """
    try:
        return json.loads(text_of(data, source) if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise ValueError(f"{shown(source)} is no JSON that can be read: it is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{shown(source)} is no JSON ({shown(error)}): copy or make it again") from error


def read_json(path: Path | str, most: int = LARGEST_TEXT) -> object:
    """The value in a JSON file.

    Raises:
        Missing: there is no such file.
        ValueError: as `read_text` and `parse_json`; the message names the file.
    """
    return parse_json(read_bytes(path, most), path)


def read_bytes(path: Path | str, most: int = LARGEST_TEXT) -> bytes:
    """The bytes of a file.

    Raises:
        Missing: there is no such file.
        ValueError: it holds more than ``most`` bytes, or cannot be read; the message names it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError as error:
        raise Missing(str(path), f"there is no file {shown(path)}") from error
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    if len(data) > most:
        raise ValueError(f"{shown(path)} holds more than {most:,} bytes, too many to be read")
    return data
