"""A picture of samples in rows of one prompt each, samplers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ratiograph.training.logs import make_grid

__all__ = ["prompt_sheet"]

SIDE = 56  # pixels of a sample, about
HEAD, MARGIN, GAP = 26, 12, 14
TEXT = 15  # height of letters


def prompt_sheet(samples: Mapping[str, Tensor], prompts: Sequence[str]) -> Image.Image:
    """One row for each prompt, one block of columns for each sampler.

    Args:
        samples: a sampler's name => its images [P n, C, H, W] in [-1, 1], n for the first prompt, then n for the second
            and so on; all samplers have the same n.
        prompts: the P prompts, written on the left.

    Returns:
        The picture, dark on white.
    """
    each = {len(images) // len(prompts) for images in samples.values()}
    assert len(each) == 1, each  # the same number everywhere
    (columns,) = each
    blocks = {name: Image.fromarray(_block(images, columns)) for name, images in samples.items()}
    font = ImageFont.load_default(TEXT)
    left = MARGIN + round(max(font.getlength(prompt) for prompt in prompts)) + MARGIN
    widths = {name: max(block.width, round(font.getlength(name)) + 2) for name, block in blocks.items()}
    width = left + sum(each + GAP for each in widths.values())
    height = HEAD + max(block.height for block in blocks.values())
    sheet = Image.new("RGB", (width, height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    row = (height - HEAD) / len(prompts)
    for number, prompt in enumerate(prompts):
        draw.text((MARGIN, HEAD + (number + 0.5) * row), prompt, fill="black", font=font, anchor="lm")
    for name, block in blocks.items():
        draw.text((left + 2, HEAD / 2), name, fill="black", font=font, anchor="lm")
        sheet.paste(block, (left, HEAD))
        left += widths[name] + GAP
    return sheet


def _block(images: Tensor, columns: int) -> np.ndarray:
    return make_grid(images.detach().to("cpu", torch.float32), columns, min_side=SIDE)
