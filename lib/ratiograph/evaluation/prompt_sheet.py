"""Samples of prompts by student and teacher, and a picture of them: a row for each prompt, samplers side by side.

Notation: a *sampler* is called as ``sampler(draws, conditions)`` and returns x0 [n, 3, 28, 28] for the samples of
``draws`` under ``conditions``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ratiograph.core.draws import SampleDraws
from ratiograph.data.lettering import Lettering
from ratiograph.evaluation.candidates import Candidate, Teacher
from ratiograph.evaluation.small_images import levels_of
from ratiograph.networks.conditions import Conditions, Prompts
from ratiograph.networks.guidance import Guided
from ratiograph.networks.samplers import HeunSampler
from ratiograph.networks.text_encoders import CaptionEncoder
from ratiograph.tasks.distillation import Distillation
from ratiograph.training.logs import make_grid

__all__ = ["Sampler", "draw_sheet", "prompt_sheet", "sampled", "sampler_of", "teacher_name", "teacher_of"]

Sampler = Callable[[SampleDraws, Conditions], Tensor]

SIDE = 56  # pixels of a sample, about
HEAD, MARGIN, GAP = 26, 12, 14
TEXT = 15  # height of letters


def sampler_of(task: Distillation, candidate: Candidate) -> Sampler:
    """A candidate of ``task`` as a sampler."""
    return lambda draws, conditions: candidate.samples_under(task, conditions.sampled(draws, task.average), draws)


def teacher_of(evaluations: int) -> Teacher:
    """The teacher by Heun's method."""
    return Teacher(HeunSampler.for_evaluations(evaluations))


def teacher_name(task: Distillation, evaluations: int) -> str:
    """'teacher, 25 evaluations', or 'teacher at guidance 2, 25 evaluations'."""
    scales = [part.guidance_scale for part in task.teacher.modules() if isinstance(part, Guided)]
    return teacher_of(evaluations).name.replace("teacher", "teacher" + "".join(f" at guidance {s:g}" for s in scales))


def sampled(name: str, sampler: Sampler, draws: SampleDraws, conditions: Conditions) -> Tensor:
    """Images [n, 3, 28, 28] of ``draws``, rounded to 256 levels; errors as of ``levels_of``."""
    with torch.no_grad():
        return levels_of(name, sampler(draws, conditions), (len(draws), 3, 28, 28))


def draw_sheet(
    samplers: Mapping[str, Sampler],
    shown: Sequence[str],
    columns: int,
    *,
    encoder: CaptionEncoder,
    seed: int,
    device: torch.device,
) -> Image.Image:
    """Samples of the prompts ``shown``, each with ``columns`` noises, which are the same for all ``samplers``."""
    conditions = Prompts(captions=[prompt for prompt in shown for _ in range(columns)], encoder=encoder)
    indices = range(len(conditions.captions))
    return prompt_sheet(
        {name: sampled(name, one, SampleDraws(seed, indices, device), conditions) for name, one in samplers.items()},
        shown,
    )


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
    font = Lettering(TEXT)
    left = MARGIN + round(max(font.getlength(prompt) for prompt in prompts)) + MARGIN
    widths = {name: max(block.width, round(font.getlength(name)) + 2) for name, block in blocks.items()}
    width = left + sum(each + GAP for each in widths.values())
    height = HEAD + max(block.height for block in blocks.values())
    sheet = Image.new("RGB", (width, height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    row = (height - HEAD) / len(prompts)
    for number, prompt in enumerate(prompts):
        font.write(draw, (MARGIN, HEAD + (number + 0.5) * row), prompt, "lm")
    for name, block in blocks.items():
        font.write(draw, (left + 2, HEAD / 2), name, "lm")
        sheet.paste(block, (left, HEAD))
        left += widths[name] + GAP
    return sheet


def _block(images: Tensor, columns: int) -> np.ndarray:
    return make_grid(images.detach().to("cpu", torch.float32), columns, min_side=SIDE)
