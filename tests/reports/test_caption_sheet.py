"""Pictures of samples with captions: every pixel of every image in its place, captions cut to what fits."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from ratiograph.data import lettering
from ratiograph.data.lettering import Lettering
from ratiograph.reports.caption_sheet import LINES, TEXT, caption_sheet, wrapped
from ratiograph.reports.sample_files import CaptionSheet

FONT = ImageFont.load_default(TEXT)


@pytest.mark.parametrize(
    "caption", ["a cat", "a photograph of a cat, sleeping", "x" * 10_000, "word " * 2_000, "", "  "]
)
def test_captions_are_cut_to_lines_that_fit(caption):
    lines = wrapped(caption, 100, FONT)
    assert len(lines) <= LINES
    assert all(0 < FONT.getlength(line) <= 100 for line in lines)
    words = " ".join(caption.split())
    told = " ".join(lines) if " " in words else "".join(lines)
    if len(words) < 40:
        assert told == words  # nothing is lost where it fits
    else:
        assert told.endswith("…")
        assert words.startswith(told[:-1].rstrip())


def test_a_line_too_narrow_for_a_letter_ends():
    assert len(wrapped("abc", 1, FONT)) == LINES


@pytest.mark.parametrize("channels", [1, 3])
def test_images_lie_in_their_cells(channels):
    generator = np.random.default_rng(0)
    cells = generator.integers(0, 256, (15, 2, 28, 28, channels), dtype=np.uint8)
    sheet = np.asarray(caption_sheet(cells, ["teacher", "student"], [f"number {k}" for k in range(15)]))
    left = int(np.flatnonzero((sheet != 255).any((0, 2)))[-1]) + 1 - 13 * 114 + 2  # thirteen columns of four times 28
    for k, cell in enumerate(cells):
        for row, image in enumerate(cell):
            top, x = 10 + k // 13 * (2 * 114 + 16 + 10) + 114 * row, left + k % 13 * 114
            found = sheet[top : top + 112 : 4, x : x + 112 : 4]
            assert np.array_equal(found, np.broadcast_to(image, (28, 28, 3))), (k, row)


def test_large_images_keep_their_size():
    sheet = caption_sheet(np.zeros((5, 1, 512, 512, 3), np.uint8), ["student"], ["a"] * 5)
    assert sheet.size == (10 + 3 * 514 + 10, 10 + 2 * (514 + 16 + 10))


def test_the_file_takes_captions_in_turn_and_batches_in_order(tmp_path):
    x0 = torch.rand(5, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = CaptionSheet(tmp_path / "a.png", ["above", "below"], ["one", "two"])
    sheet.add(range(3), x0[:3], None)
    sheet.add(range(3, 5), x0[3:], None)
    sheet.finish()
    cells = ((x0 + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()
    expected = caption_sheet(cells, ["above", "below"], ["one", "two", "one", "two", "one"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(expected))
    labelled = CaptionSheet(tmp_path / "b.png", ["student"])
    labelled.add(range(4, 6), x0[:2, :1], torch.tensor([7, 8]))
    labelled.add(range(6, 7), x0[2:3, :1], None)
    assert labelled.texts == ["class 7", "class 8", "sample 6"]


@pytest.mark.parametrize("text", ["a plain caption", "a long caption, cut…"])
def test_latin_text_is_in_pillows_own_font(text):
    drawn, expected = (Image.new("RGB", (200, 30), "white") for _ in range(2))
    Lettering(TEXT).write(ImageDraw.Draw(drawn), (3, 15), text, "lm")
    ImageDraw.Draw(expected).text((3, 15), text, fill="black", font=FONT, anchor="lm")
    assert drawn.tobytes() == expected.tobytes()
    assert Lettering(TEXT).getlength(text) == FONT.getlength(text)


@pytest.mark.parametrize("text", ["Красная тройка", "λ = 0.5", "مرحبا", "一只猫", "🚀 😀", "\ue000", "a\x1b[31mb"])
def test_no_character_is_a_box(text):
    """Each is drawn by a font that has it, or spelled out in one that has the letters of its number."""
    for path, part in lettering._parts(text):
        assert all(ord(character) in lettering._characters(path) for character in part), (path, part)
    if text in ("\ue000", "a\x1b[31mb"):
        assert "".join(part for _, part in lettering._parts(text)) == ascii(text)[1:-1]
    elif text[0] in "Кλم":
        assert "".join(part for _, part in lettering._parts(text)) == text


def test_names_in_figures_are_no_formulas():
    assert lettering.in_figure("a $x_{ λ \n\ue000") == r"a \$x_{ λ \n\ue000"
