"""Fréchet distance between Gaussians fitted to features.

Notation: features [N, D]; mean m [D]; covariance C [D, D] with the divisor N - 1. The distance (Dowson & Landau 1982;
Heusel et al. 2017, where it is named FID on Inception features) is

    d^2 = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^{1/2} C_b C_a^{1/2})^{1/2}

and, as everywhere in the literature, its square is what is called the distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "Fitted", "Gaussian", "fit", "frechet_distance", "frechet_with_error"]

CHUNK = 4096  # feature vectors converted to float64 at a time: 64 MB at D = 2,048


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D], float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


class FeatureStatistics:
    """Mean and covariance of features, float64 on the CPU, batch by batch (Chan, Golub & LeVeque 1983)."""

    def __init__(self, size: int):
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)  # sum of (f - m)(f - m)^T

    def update(self, features: Tensor) -> FeatureStatistics:
        """Takes in ``features`` [N, size]; returns itself.

        Raises:
            ValueError: a feature is not finite.
        """
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            bad = int((~features.isfinite()).any(1).sum())
            raise ValueError(f"{bad} of {len(features)} feature vectors are not finite: check the samples for NaN")
        mean = features.mean(0)
        centred = features - mean
        return self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Takes in the features that ``other`` has seen; returns itself."""
        return self._add(other.count, other.mean, other.scatter)

    def _add(self, added: int, mean: Tensor, scatter: Tensor) -> FeatureStatistics:
        count = self.count + added
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * added / count)
        self.mean += shift * (added / count)
        self.count = count
        return self

    @property
    def covariance(self) -> Tensor:
        """[size, size], unbiased."""
        assert self.count > 1, "a covariance needs two samples"
        return self.scatter / (self.count - 1)


Fitted = Gaussian | FeatureStatistics


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _distance(root: Tensor, a: Fitted, b: Fitted) -> float:
    """d^2, given the root of a's covariance."""
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean - b.mean).square().sum()
    distance = mean + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance(a: Fitted, b: Fitted) -> float:
    """The squared Fréchet distance between the fitted Gaussians, >= 0.

    Only symmetric matrices are decomposed, so that singular covariances (fewer samples than features, dead
    features) need no offset on the diagonal.
    """
    assert a.mean.shape == b.mean.shape, (a.mean.shape, b.mean.shape)
    return _distance(_square_root(a.covariance), a, b)


def fit(features: Tensor) -> FeatureStatistics:
    """Statistics of ``features`` [N, D], a chunk at a time."""
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(CHUNK):
        statistics.update(part)
    return statistics


def frechet_with_error(features: Tensor, reference: Fitted, *, groups: int = 10) -> tuple[float, float]:
    """The distance of samples to a reference, and its standard error by the jackknife over groups of samples.

    With theta_g the distance without the g-th of G groups, the error is sqrt((G - 1)/G sum (theta_g - mean theta)^2)
    (Efron & Tibshirani 1993, Eq. 11.5). It says how far another set of as many samples would be off; neither the
    reference's own sampling nor the distance's bias of order 1/N is in it.

    Args:
        features: [N, D], rows in random order, N >= 2.
        reference: the Gaussian to compare with.
        groups: G, consecutive parts of nearly equal size; fewer where a part would have no two samples.

    Returns:
        ``(distance, standard error)``; the error is NaN for fewer than four samples.

    Raises:
        ValueError: a feature is not finite, or fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"a Fréchet distance needs at least two samples, got {len(features)}")
    root = _square_root(reference.covariance)
    parts = [fit(part) for part in features.tensor_split(max(min(groups, len(features) // 2), 1))]
    distance = _distance(root, reference, _merged(parts))
    if len(parts) < 2:
        return distance, math.nan
    left_out = [_merged([*parts[:g], *parts[g + 1 :]]) for g in range(len(parts))]
    thetas = torch.tensor([_distance(root, reference, rest) for rest in left_out], dtype=torch.float64)
    squares = (thetas - thetas.mean()).square().sum()
    return distance, math.sqrt(float(squares) * (len(parts) - 1) / len(parts))


def _merged(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    statistics = FeatureStatistics(len(parts[0].mean))
    for part in parts:
        statistics.merge(part)
    return statistics
