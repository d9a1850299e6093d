"""Energy distance between two sets of samples, and class shares.

Notation: x [N, D] and y [M, D] are samples of P and Q; X, X' ~ P and Y, Y' ~ Q independent. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["class_histogram", "energy_distance"]

BLOCK = 1024  # rows at a time: 8 MB of distances for every 1,024 samples on the other side


def _mean_distance(x: Tensor, y: Tensor) -> float:
    """Mean of |x_i - y_j| over all pairs."""
    sums = (torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").sum() for rows in x.split(BLOCK))
    return math.fsum(map(float, sums)) / (len(x) * len(y))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely & Rizzo 2013) of the two empirical distributions.

    Args:
        x: samples [N, D].
        y: samples [M, D].

    Returns:
        The distance in the unit of the samples, >= 0. (scipy's function of this name returns its square root.)

    Raises:
        ValueError: shapes that do not fit, or fewer than two samples.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"samples must be [N, D] and [M, D], got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"at least two samples a side are needed, got {len(x)} and {len(y)}")
    x, y = (s.detach().to("cpu", torch.float64) for s in (x, y))
    return 2 * _mean_distance(x, y) - (_mean_distance(x, x) + _mean_distance(y, y))


def class_histogram(labels: Tensor | Sequence[int], classes: int) -> list[float]:
    """Share of each class among ``labels`` (int, in 0 .. classes - 1); the shares sum to 1.

    Raises:
        ValueError: no labels, or one out of range.
    """
    labels = torch.as_tensor(labels).reshape(-1)
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be some of 0 .. {classes - 1}, got {labels.unique().tolist()}")
    return (torch.bincount(labels, minlength=classes).double() / len(labels)).tolist()
