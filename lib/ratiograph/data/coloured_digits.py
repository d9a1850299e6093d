"""Coloured digits with captions: a small text-to-image world made of the embedded MNIST digits.

Notation: a digit's pixels are v(i) in [0, 1]; its ink has one colour c in [0, 1]^3, so that the image is v(i) c on
black. A colour's name stands for a family of shades: c is the colour of `COLOURS` with noise in every channel, times a
brightness. A caption names the digit, the colour, both or neither; what it does not name may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ratiograph.data.images import encode_png, pixels_of
from ratiograph.data.raw_samples import RawImage, decode_label

__all__ = ["COLOURS", "DIGITS", "caption_of", "coloured_digits_samples", "named"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (0.95, 0.15, 0.15),
    "yellow": (0.90, 0.80, 0.10),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "purple": (0.75, 0.20, 0.85),
}
COPIES = 2  # colourings of each digit
SHADE = 0.05  # standard deviation of the noise in each channel of a colour
DARKEST = 0.75  # brightness is uniform from here to 1
FORMS = ((True, True), (True, True), (True, False), (False, True))  # does a caption name (the digit, the colour)?


def caption_of(digit: int | None, colour: str | None) -> str:
    """'a red seven', 'a seven', 'a red digit' or 'a digit'; None is not named."""
    noun = "digit" if digit is None else DIGITS[digit]
    words = [noun] if colour is None else [colour, noun]
    return " ".join(["an" if words[0] == "eight" else "a", *words])


def named(caption: str) -> tuple[int | None, str | None]:
    """The digit and the colour that ``caption`` names; None for each that it does not name."""
    words = caption.lower().split()
    digits = [number for number, word in enumerate(DIGITS) if word in words]
    colours = [colour for colour in COLOURS if colour in words]
    return (digits[0] if digits else None), (colours[0] if colours else None)


def coloured_digits_samples(digits: Sequence[RawImage]) -> list[Mapping[str, object]]:
    """Each digit in two colours, drawn uniformly, as 28 x 28 RGB images: 10,000 samples of the 5,000 embedded digits.

    ``txt`` is the caption: half of them name digit and colour, a quarter the digit alone, a quarter the colour alone.
    ``cls`` is the digit, whether it is named or not. Any run of 500 samples holds 50 of each digit.

    Args:
        digits: the samples of the data set 'mnist', in its order.
    """
    draws, names, samples = np.random.default_rng(1), tuple(COLOURS), []
    for copy in range(COPIES):
        for sample in digits:
            digit, name = decode_label(sample), names[draws.integers(len(names))]
            shade = np.clip(np.array(COLOURS[name]) + SHADE * draws.standard_normal(3), 0, 1)
            ink = shade * draws.uniform(DARKEST, 1)
            grey = pixels_of(sample.image)[1][0]  # [28, 28]
            names_digit, names_colour = FORMS[draws.integers(len(FORMS))]
            caption = caption_of(digit if names_digit else None, name if names_colour else None)
            samples.append(
                {
                    "__key__": f"{copy}{sample.key}",
                    "png": encode_png(np.rint(grey[..., None] * ink).astype(np.uint8)),
                    "txt": caption.encode(),
                    "cls": str(digit).encode(),
                }
            )
    return samples
