"""Distances between two sets of samples, and class shares.

Notation: x [N, D] and y [M, D] are samples of P and Q; X, X' ~ P and Y, Y' ~ Q independent. Sums run over
    all pairs
in float64, a block of rows at a time, so that memory stays bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["class_histogram", "energy_distance", "mmd_rbf"]

BLOCK = 1024  # rows at a time: 8 MB of distances for every 1,024 samples on the other side


def _mean_over_pairs(x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor]) -> float:
    """Mean of ``function(|x_i - y_j|)`` over all pairs."""
    sums = [
        function(torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist")).sum() for rows in x.split(BLOCK)
    ]
    return math.fsum(float(s) for s in sums) / (len(x) * len(y))


def _discrepancy(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor], unbiased: bool) -> float:
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y) for a kernel of the distance."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"samples must be [N, D] and [M, D], got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"at least two samples a side are needed, got {len(x)} and {len(y)}")
    x, y = (s.detach().to("cpu", torch.float64) for s in (x, y))
    at_zero = float(kernel(torch.zeros(1, dtype=torch.float64)))

    def within(s: Tensor) -> float:
        mean = _mean_over_pairs(s, s, kernel)
        return (mean * len(s) - at_zero) / (len(s) - 1) if unbiased else mean  # without the pairs (i, i)

    return within(x) + within(y) - 2 * _mean_over_pairs(x, y, kernel)


def energy_distance(x: Tensor, y: Tensor, *, unbiased: bool = False) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely & Rizzo 2013); 0 if and only if P = Q.

    Args:
        x: samples [N, D].
        y: samples [M, D].
        unbiased: leave the pairs of a sample with itself out of the within-set means. The estimate is then
            right on average and may be negative; with them it is the exact distance of the two empirical
            distributions.

    Returns:
        The distance in the unit of the samples. (scipy's function of this name returns its square root.)

    Raises:
        ValueError: shapes that do not fit, or fewer than two samples.
    """
    return _discrepancy(x, y, torch.neg, unbiased)


def mmd_rbf(x: Tensor, y: Tensor, *, bandwidth: float, unbiased: bool = False) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012), kernel k(x, y) = exp(-|x - y|^2 / (2
    bandwidth^2)).

    Args:
        x: samples [N, D].
        y: samples [M, D].
        bandwidth: in the unit of the samples, > 0.
        unbiased: as in ``energy_distance``.

    Raises:
        ValueError: a bandwidth that is not positive, shapes that do not fit, or fewer than two samples.
    """
    if bandwidth <= 0:
        raise ValueError(f"bandwidth={bandwidth} must be positive")
    return _discrepancy(x, y, lambda d: torch.exp(-d.square() / (2 * bandwidth**2)), unbiased)


def class_histogram(labels: Tensor | Sequence[int], classes: int) -> list[float]:
    """Share of each class among ``labels`` (int, in 0 .. classes - 1); the shares sum to 1.

    Raises:
        ValueError: no labels, or one out of range.
    """
    labels = torch.as_tensor(labels).reshape(-1)
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be some of 0 .. {classes - 1}, got {labels.unique().tolist()}")
    return (torch.bincount(labels, minlength=classes).double() / len(labels)).tolist()
