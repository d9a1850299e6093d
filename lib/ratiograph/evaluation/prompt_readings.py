"""What is read off images of coloured digits, against what their captions name.

A caption names a digit, a colour, both or neither; what it does not name is *open*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ratiograph.data.coloured_digits import COLOURS, DIGITS, caption_of, named

__all__ = ["Readings", "prompts", "to_grey"]


def prompts() -> list[str]:
    """200 prompts in the proportions of the data: of any four, two name both, one the digit and one the colour."""
    names, found = tuple(COLOURS), []
    for number in range(len(DIGITS) * len(names)):
        digit, colour = number % len(DIGITS), names[number // len(DIGITS)]
        both = caption_of(digit, colour)
        found += [both, caption_of(digit, None), both, caption_of(None, names[number % len(names)])]
    return found


def to_grey(images: Tensor) -> Tensor:
    """The grey digits [N, 1, H, W] of coloured ones [N, 3, H, W], both in [-1, 1]: their brightest pixel becomes 1."""
    light = (images.amax(1, keepdim=True) + 1) / 2
    return light / light.amax((2, 3), keepdim=True).clamp(min=0.1) * 2 - 1


@dataclass(frozen=True)
class Readings:
    """What was read off N images: digit features [N, D], digits [N], colours [N] and, if any, log R [N]."""

    captions: Sequence[str]
    features: Tensor
    digits: Tensor
    colours: Tensor
    log_rewards: Tensor | None

    def accuracies(self) -> dict[str, float]:
        """Shares of what is named that is right; NaN where nothing is named."""
        colours, right = list(COLOURS), []
        for caption, digit, colour in zip(self.captions, self.digits.tolist(), self.colours.tolist(), strict=True):
            said_digit, said_colour = named(caption)
            right.append(
                (
                    None if said_digit is None else said_digit == digit,
                    None if said_colour is None else said_colour == colours[colour],
                )
            )
        told = [pair for pair in right if pair != (None, None)]
        return {
            "prompt_accuracy": _share([False not in pair for pair in told]),
            "digit_accuracy": _share([digit for digit, _ in right if digit is not None]),
            "colour_accuracy": _share([colour for _, colour in right if colour is not None]),
        }

    def where_open(self, part: int) -> Tensor:
        """Which captions [N] leave the digit (0) or the colour (1) open."""
        return torch.tensor([named(caption)[part] is None for caption in self.captions])


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers) if answers else math.nan
