"""Fréchet distance between Gaussians fitted to features.

Notation: features [N, D]; mean m [D]; covariance C [D, D] with the divisor N - 1. The distance (Dowson &
    Landau 1982;
Heusel et al. 2017, where it is named FID on Inception features) is

    d^2 = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^{1/2} C_b C_a^{1/2})^{1/2}

and, as everywhere in the literature, its square is what is called the distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "frechet_distance"]


class FeatureStatistics:
    """Mean and covariance of features, in float64, batch by batch (Chan, Golub & LeVeque 1983)."""

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
        count = self.count + len(features)
        mean = features.mean(0)
        shift = mean - self.mean
        centred = features - mean
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(features) / count)
        self.mean += shift * (len(features) / count)
        self.count = count
        return self

    @property
    def covariance(self) -> Tensor:
        """[size, size], unbiased."""
        assert self.count > 1, "a covariance needs two samples"
        return self.scatter / (self.count - 1)


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The squared Fréchet distance between the fitted Gaussians, >= 0.

    Only symmetric matrices are decomposed, so that singular covariances (fewer samples than features, dead
    features) need no offset on the diagonal.
    """
    assert a.mean.shape == b.mean.shape, (a.mean.shape, b.mean.shape)
    root = _square_root(a.covariance)
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean - b.mean).square().sum()
    distance = mean + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)
