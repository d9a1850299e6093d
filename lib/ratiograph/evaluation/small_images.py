"""Shared by the evaluators of digits and captions: checks, rounding of images, tilted shares, Gaussians as text.

Notation: x [n, C, H, W] in [-1, 1] are images as a sampler returns them; p(y) the shares of the classes y; m [D] and
C [D, D] mean and covariance of features.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ratiograph.evaluation.frechet import Fitted, Gaussian

__all__ = ["check_sizes", "gaussian_of", "gaussian_text", "levels_of", "tilted"]


def check_sizes(
    evaluator: object, samples: int, during_samples: int, batch_size: int, teacher_evaluations: Sequence[int]
) -> None:
    """Raises a ValueError that names the ``evaluator``'s class if one of its arguments is too small."""
    if min(samples, during_samples) < 4 or batch_size < 1 or min(teacher_evaluations, default=1) < 1:
        raise ValueError(
            f"{type(evaluator).__name__} needs samples >= 4, during_samples >= 4, batch_size >= 1 and "
            f"teacher_evaluations >= 1, got {samples}, {during_samples}, {batch_size} and {list(teacher_evaluations)}"
        )


def levels_of(name: str, images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``images`` [n, C, H, W] float32, each pixel the nearest of the 256 values that an image file has.

    Args:
        name: of the row, for errors.
        images: x, any finite numbers; clipped to [-1, 1].
        shape: (n, C, H, W) as requested.

    Raises:
        ValueError: the images have another shape, or are not finite.
    """
    if images.shape != shape:
        raise ValueError(
            f"'{name}' returned images {tuple(images.shape)}, expected {tuple(shape)}: bind Experiment.evaluator to an "
            "evaluator of such images, or to None"
        )
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(images)} images of '{name}' hold NaN or infinity: its weights are broken. Resume from "
            "an earlier checkpoint, and lower the learning rate or set precision = 'fp32'"
        )
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().div(127.5).sub(1)


def tilted(shares: Sequence[float], log_rewards: Sequence[float]) -> list[float]:
    """p*(y), proportional to e^(b_y) p(y), from the ``shares`` p(y) and ``log_rewards`` b_y of the classes."""
    masses = [share * math.exp(b) for share, b in zip(shares, log_rewards, strict=True)]
    return [mass / math.fsum(masses) for mass in masses]


def gaussian_text(fitted: Fitted) -> str:
    """m and C as text for a row of JSON: float32, little-endian, base64; ``gaussian_of`` reads it."""
    values = torch.cat([fitted.mean[None], fitted.covariance])
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def gaussian_of(text: str) -> Gaussian:
    """Inverse of ``gaussian_text``, to float32's rounding."""
    values = torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64))
    size = (math.isqrt(1 + 4 * len(values)) - 1) // 2  # D + D^2 values
    mean, *rows = values.reshape(size + 1, size)
    return Gaussian(mean, torch.stack(rows))
