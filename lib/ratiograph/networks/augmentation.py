"""Augmentation of training images, with labels from which the network knows how each image was moved.

Notation: an image is moved by y = A x + d, with x and y in pixels from the image's centre, x to the right and y
downwards; the augmented image at y is the image at A^-1 (y - d), continued outside by reflection at its outermost
pixels. a_0, ..., a_7 are the random parameters of one image, 0 where nothing is done (EDM, Table 6); ``labels`` [B, 9]
is what ``Condition.augment`` holds. At labels 0 a network conditioned on them learns the distribution of the images
that were not augmented: the augmentation does not leak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratiograph.core.domains import NonNegative, UnitInterval
from ratiograph.core.randomness import normal, uniform
from ratiograph.core.types import Condition, expand

__all__ = ["Augmentation", "Flips", "NoAugmentation", "NonLeaky"]

# The low-pass filter of the symlet with six vanishing moments: sums to sqrt(2), orthonormal to its even shifts.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
LABELS = 9
CENTRE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)  # where a smooth signal's sample comes out, in taps


class Augmentation:
    """Base class."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The augmented ``images`` [B, C, H, W], and labels [B, 9] or None if the network gets none."""
        raise NotImplementedError

    def check(self, *networks: nn.Module) -> None:
        """Raises a ValueError if one of the ``networks`` that learn from the images lacks the labels it needs."""

    def apply(self, images: Tensor, condition: Condition, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """The augmented images, and ``condition`` with their labels."""
        images, labels = self(images, generator)
        return images, replace(condition, augment=labels)


class NoAugmentation(Augmentation):
    """Images as they are."""

    def __call__(self, images, generator):
        return images, None


class Flips(Augmentation):
    """Horizontal flips without labels: the network learns the mixture of p and its mirror image.

    Args:
        probability: of flipping an image.
    """

    def __init__(self, *, probability: UnitInterval = 0.5):
        self.probability = probability

    def __call__(self, images, generator):
        chosen = uniform((len(images),), generator) < self.probability
        return torch.where(expand(chosen, images), images.flip(3), images), None


@dataclass(frozen=True)
class Parameters:
    """a_0, ..., a_7, each [B] and all of one dtype, in the order in which they act on an image."""

    flip_x: Tensor  # 1 mirrors left and right, 0 does not
    flip_y: Tensor
    scale: Tensor  # log size, in units of ``NonLeaky.scale_std``
    rotation: Tensor  # counterclockwise as the image is seen, in radians
    axis: Tensor  # direction of the anisotropy, in radians
    anisotropy: Tensor  # log stretch along the axis, and as much compression across it, in units of ``scale_std``
    shift_x: Tensor  # in units of ``NonLeaky.shift_std`` W to the right
    shift_y: Tensor  # and H downwards

    def labels(self) -> Tensor:
        """(a_0, a_1, a_2, cos a_3 - 1, sin a_3, a_5 cos a_4, a_5 sin a_4, a_6, a_7) [B, 9]."""
        rotation = self.rotation.cos() - 1, self.rotation.sin()
        stretch = self.anisotropy * self.axis.cos(), self.anisotropy * self.axis.sin()
        return torch.stack([self.flip_x, self.flip_y, self.scale, *rotation, *stretch, self.shift_x, self.shift_y], 1)


class NonLeaky(Augmentation):
    """EDM's pipeline (Karras et al. 2022, Appendix F.2, Table 6): one linear map and shift for every image.

    Each step is taken with the given probability: y-flip; scaling by 2^(scale_std a_2), a_2 ~ N(0, 1); rotation by
    a_3 ~ U(-pi, pi); stretching by 2^(scale_std a_5) along the axis a_4, a_5 ~ N(0, 1); a shift by shift_std (W a_6,
    H a_7), a_6 and a_7 ~ N(0, 1). The x-flip is a fair coin in every image. a_4 is 0 for half of the images and
    U(-pi, pi) for the others, as in EDM's program; the paper's table has the latter only. Images are resampled between
    an upsampling by 2 and its adjoint, so images shifted by whole pixels or not at all keep their values exactly.

    The labels determine all but the sign of the stretch: (a_4, a_5) and (a_4 + pi, -a_5) have the same ones, as in EDM.

    For networks with ``augment_labels=9``; others would learn to make augmented images.

    Args:
        probability: 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2 (Table 6); 0 does nothing, not even the x-flip.
        scale_std: standard deviation of the log2 of scales and stretches.
        shift_std: standard deviation of shifts, as a part of the image's size.
    """

    def __init__(
        self, *, probability: UnitInterval = 0.12, scale_std: NonNegative = 0.2, shift_std: NonNegative = 0.125
    ):
        self.probability, self.scale_std, self.shift_std = probability, scale_std, shift_std

    def check(self, *networks):
        for network in networks:
            if getattr(network, "augment_labels", 0) != LABELS:
                name = type(network).__name__
                raise ValueError(
                    f"NonLeaky: {name} has no augmentation labels and would learn to make augmented images: set "
                    f"{name}.augment_labels = {LABELS} where it has that argument, or use Flips or no augmentation"
                )

    def __call__(self, images, generator):
        parameters = self.draw(len(images), generator)
        return self.transform(images, parameters), parameters.labels()

    def draw(self, samples: int, generator: torch.Generator) -> Parameters:
        """Random parameters, float32 on the generator's device."""
        coins, normals = uniform((samples, 10), generator).T, normal((samples, 4), generator).T
        taken = (coins[:5] < self.probability).float()  # y-flip, scale, rotation, stretch, shift
        rotation, axis = (2 * coins[5:7] - 1) * math.pi
        heads = (coins[7:] < 0.5).float()
        return Parameters(
            flip_x=heads[0] if self.probability else torch.zeros_like(heads[0]),
            flip_y=heads[1] * taken[0],
            scale=normals[0] * taken[1],
            rotation=rotation * taken[2],
            axis=axis * heads[2] * taken[3],
            anisotropy=normals[1] * taken[3],
            shift_x=normals[2] * taken[4],
            shift_y=normals[3] * taken[4],
        )

    def transform(self, images: Tensor, parameters: Parameters) -> Tensor:
        """``images`` [B, C, H, W] moved by ``parameters``, in their dtype; those with all parameters 0 bit for bit."""
        p = parameters
        flipped = torch.where(expand(p.flip_x > 0, images), images.flip(3), images)
        flipped = torch.where(expand(p.flip_y > 0, images), flipped.flip(2), flipped)
        size = torch.exp2(self.scale_std * p.scale)
        stretch = torch.exp2(self.scale_std * p.anisotropy)
        unstretch = turn(-p.axis) @ torch.diag_embed(torch.stack([1 / stretch, stretch], 1)) @ turn(p.axis)
        inverse = turn(p.rotation) @ unstretch / size[:, None, None]
        height, width = images.shape[2:]
        shift = torch.stack([p.shift_x * (self.shift_std * width), p.shift_y * (self.shift_std * height)], 1)
        moved = torch.stack([p.scale, p.rotation, p.anisotropy, p.shift_x, p.shift_y]).ne(0).any(0)
        return torch.where(expand(moved, images), warp(flipped, inverse, shift), flipped)


def turn(angle: Tensor) -> Tensor:
    """[[cos, -sin], [sin, cos]] of each ``angle`` [B], [B, 2, 2]; clockwise as an image is seen."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def warp(images: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
    """Images whose value at y is that of ``images`` at A^-1 (y - d): x2 upsampling => bilinear lookup => its adjoint.

    The continuation by reflection has the period 2 (W - 1), so one upsampled period of it suffices for any shift.

    Args:
        images: [B, C, H, W], H and W at least 2.
        inverse: A^-1 [B, 2, 2].
        shift: d [B, 2], in pixels.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    (height, up_y, down_y), (width, up_x, down_x) = (
        (size, *_resampling(size, images.device, dtype)) for size in images.shape[2:]
    )
    fine = up_y @ images.to(dtype) @ up_x.T  # one period and the next sample, [B, C, 4H - 3, 4W - 3]
    # Sample m of the upsampled image lies at pixel (m - CENTRE) / 2.
    y, x = (
        (torch.arange(down.shape[1], device=images.device, dtype=dtype) - CENTRE - (size - 1)) / 2
        for size, down in ((height, down_y), (width, down_x))
    )
    targets = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [2H + 10, 2W + 10, 2]
    sources = (targets - shift.to(dtype)[:, None, None]) @ inverse.to(dtype).mT[:, None]
    grid = [  # index into the period, [0, 4 (size - 1)] => [-1, 1]
        torch.remainder(2 * source + size - 1 + CENTRE, 4 * (size - 1)) / (2 * (size - 1)) - 1
        for source, size in zip(sources.unbind(-1), (width, height), strict=True)
    ]
    found = functional.grid_sample(fine, torch.stack(grid, -1), mode="bilinear", align_corners=True)
    return (down_y @ found @ down_x.T).to(images.dtype)


@lru_cache(maxsize=16)
def _resampling(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``up`` [4 size - 3, size], upsampling of the reflected signal, and ``down`` [size, 2 size + 10], its adjoint."""
    if size < 2:
        raise ValueError(f"an image side of {size} pixel cannot be reflected: NonLeaky needs at least 2")
    period, root = 2 * (size - 1), math.sqrt(2)
    up = torch.zeros(2 * period + 1, size, dtype=torch.float64)
    down = torch.zeros(size, 2 * size + len(SYM6) - 2, dtype=torch.float64)
    for tap, value in enumerate(SYM6):
        for row in range(tap % 2, 2 * period + 1, 2):  # taps meet the samples that are not the inserted zeros
            column = (row - tap) // 2 % period
            up[row, min(column, period - column)] += root * value
        rows = torch.arange(size)
        down[rows, 2 * rows + tap] = value / root
    return up.to(device, dtype), down.to(device, dtype)
