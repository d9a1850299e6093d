"""Pictures of samples with captions: every pixel of every image in its place, captions cut to what fits."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

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
