"""A picture of samples with their captions: each cell has its images one under another, and their caption below.

Notation: N cells of R images [H, W, C]; the r-th image of every cell is of the same sampler (teacher, student, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ratiograph.data.lettering import Lettering

__all__ = ["caption_sheet", "wrapped"]

SIDE, WIDTH = 112, 1600  # pixels: an image's longer side at least, the sheet's width about
GAP, MARGIN = 2, 10
TEXT, LINES = 13, 3  # height of letters, lines of a caption
LONGEST = 400  # characters of a caption that are read


def wrapped(caption: str, width: float, font: Lettering) -> list[str]:
    """``caption`` in at most ``LINES`` lines of at most ``width`` pixels, broken at spaces where that can be."""
    rest, lines = " ".join(caption[:LONGEST].split()), []
    while rest and len(lines) < LINES:
        fits = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
        space = rest.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(rest) or space <= 0 else space
        lines.append(rest[:cut])
        rest = rest[cut:].strip()
    if rest:
        last = next(n for n in range(len(lines[-1]), -1, -1) if n == 0 or font.getlength(lines[-1][:n] + "…") <= width)
        lines[-1] = lines[-1][:last] + "…"
    return lines


def caption_sheet(cells: np.ndarray, rows: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """The picture, dark on white.

    Args:
        cells: uint8 [N, R, H, W, C], C = 1 or 3; small images are enlarged by a whole factor.
        rows: names of the R images of a cell, written on the left; one alone is left out.
        captions: N texts; of long ones the beginning is shown.
    """
    assert cells.shape[:2] == (len(captions), len(rows)), (cells.shape, len(captions), len(rows))
    repeat = max(1, -(-SIDE // max(cells.shape[2:4])))
    cells = cells.repeat(repeat, 2).repeat(repeat, 3)
    height, width = cells.shape[2:4]
    font, own = Lettering(TEXT), ImageFont.load_default(TEXT)
    names = list(rows) if len(rows) > 1 else [""]
    left = MARGIN + round(max(font.getlength(line) for name in names for line in name.split("\n")))
    left += MARGIN if len(rows) > 1 else 0
    columns = max(1, min(len(cells), (WIDTH - left) // (width + GAP)))
    texts = [wrapped(caption, width - 2, font) for caption in captions]
    line = TEXT + 3
    down = len(rows) * (height + GAP) + line * max(map(len, texts)) + MARGIN
    sheet = Image.new(
        "RGB", (left + columns * (width + GAP) + MARGIN, MARGIN + -(-len(cells) // columns) * down), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        top, x = MARGIN + number // columns * down, left + number % columns * (width + GAP)
        for row, image in enumerate(cell):
            y = top + row * (height + GAP)
            sheet.paste(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), (x, y))
            if number % columns == 0 and len(rows) > 1:
                draw.text((MARGIN, y + height / 2), rows[row], fill="black", font=own, anchor="lm")
        for place, words in enumerate(text):
            font.write(draw, (x + 1, top + len(rows) * (height + GAP) + place * line), words)
    return sheet
