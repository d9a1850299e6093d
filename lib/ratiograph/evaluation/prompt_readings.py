"""Digits and colours recognised in images, compared with what their captions name.

A caption names a digit, a colour, both or neither; what it does not name is *open*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ratiograph.data.coloured_digits import COLOURS, DIGITS, caption_of, named
from ratiograph.evaluation.collapse import mean_pairwise_distance

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
    """Readings of N images: digit features [N, D], digits [N], colours [N] and, with a reward, log R [N]."""

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
        return {
            "prompt_accuracy": _share([False not in pair for pair in right if pair != (None, None)]),
            "digit_accuracy": _share([digit for digit, _ in right if digit is not None]),
            "colour_accuracy": _share([colour for _, colour in right if colour is not None]),
        }

    def spreads(self) -> dict[str, tuple[int, float]]:
        """Of each caption of n >= 2 images, (n, the mean distance of the features of two of them)."""
        found: dict[str, list[int]] = {}
        for place, caption in enumerate(self.captions):
            found.setdefault(caption, []).append(place)
        return {
            caption: (len(places), mean_pairwise_distance(self.features[places]))
            for caption, places in found.items()
            if len(places) > 1
        }

    def diversity(self, real: Mapping[str, tuple[int, float]]) -> float:
        """Mean distance between the features of two images of one caption, over that of two real ones.

        Args:
            real: ``spreads`` of the real digits; captions that they lack do not count.

        Returns:
            1 for real digits, 0 for a sampler that makes one image a caption, more than 1 where digits are wrong or
            badly drawn; NaN if no caption is there twice.
        """
        own = [(n, distance, real[caption][1]) for caption, (n, distance) in self.spreads().items() if caption in real]
        expected = math.fsum(n * distance for n, _, distance in own)
        return math.fsum(n * distance for n, distance, _ in own) / expected if expected else math.nan

    def where_open(self, part: int) -> Tensor:
        """Which captions [N] leave the digit (0) or the colour (1) open."""
        return torch.tensor([named(caption)[part] is None for caption in self.captions])


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers) if answers else math.nan
