"""Words on a picture, in fonts that have their letters; a character that no font of this machine has is spelled out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

__all__ = ["Lettering", "in_figure"]

OWN = ""
"""Stands for the path of the font that comes with Pillow, which has little more than Latin letters."""


class Lettering:
    """Letters of one size, black: Pillow's own, else DejaVu Sans, else those of the first font that has them.

    Args:
        size: height in pixels.
    """

    def __init__(self, size: int):
        self.size = size

    def getlength(self, text: str) -> float:
        """Width of one line of ``text`` in pixels."""
        return sum(self._font(path).getlength(part) for path, part in _parts(text))

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str = "la") -> None:
        """Draws one line at ``place``; ``anchor`` is Pillow's "la" (left, top) or "lm" (left, middle)."""
        x, y = place
        for path, part in _parts(text):
            draw.text((x, y), part, fill="black", font=self._font(path), anchor=anchor)
            x += self._font(path).getlength(part)

    def _font(self, path: str) -> ImageFont.FreeTypeFont:
        return _loaded(path, self.size)


def in_figure(text: object) -> str:
    """Foreign text for a figure of matplotlib's: no formulas, and characters that its font lacks are spelled out."""
    known = _characters(_paths()[1])
    return "".join(c if c.isprintable() and ord(c) in known else _spelled(c) for c in str(text)).replace("$", r"\$")


def _spelled(character: str) -> str:
    return ascii(character)[1:-1]


def _parts(text: str) -> list[tuple[str, str]]:
    """(path of a font, what is written in it) from left to right; a font is left only where it lacks a letter."""
    found: list[tuple[str, str]] = []
    for character in text:
        path = _path_of(character)
        if path is None:
            found.append((OWN, _spelled(character)))
        elif found and found[-1][0] != OWN and ord(character) in _characters(found[-1][0]):
            found.append((found[-1][0], character))
        else:
            found.append((path, character))
    return [(path, "".join(part for _, part in same)) for path, same in itertools.groupby(found, lambda one: one[0])]


@cache
def _path_of(character: str) -> str | None:
    """The font that draws ``character``, None if there is none."""
    if character.isascii() and character.isprintable():
        return OWN
    paths: Sequence[str] = _paths() if character.isprintable() else ()
    return next((path for path in paths if ord(character) in _characters(path) and _draws(path, character)), None)


@cache
def _loaded(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if path == OWN else ImageFont.truetype(path, size)


def _draws(path: str, character: str) -> bool:
    """Whether Pillow can draw it: of fonts that are coloured bitmaps it cannot."""
    try:
        return character.isspace() or _loaded(path, 16).getmask(character).getbbox() is not None
    except OSError:
        return False


@cache
def _paths() -> list[str]:
    """Pillow's own font, DejaVu Sans, which comes with matplotlib, and the upright fonts of the machine."""
    import matplotlib  # here, as most captions need no other font
    from matplotlib import font_manager

    known = [font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name]  # it draws boxes
    upright = {font.fname for font in known if font.style == "normal" and font.weight in (400, "normal", "regular")}
    return [OWN, str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), *sorted(upright)]


@cache
def _characters(path: str) -> frozenset[int]:
    """The code points that a font has; none of a file that is no font."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(ImageFont.load_default(16).path if path == OWN else path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
