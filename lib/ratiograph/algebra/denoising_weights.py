"""lambda(s), how a denoising loss weighs the noise levels.

Notation: s = sigma / alpha is the relative noise level [B] and mu the denoiser's estimate of x0; the loss is
E[ lambda(s) |mu(x_t) - x0|^2 ], mean over dimensions. With y = x_t / alpha the noise that mu predicts is (y - mu) / s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ratiograph.core.domains import Positive, Scale
from ratiograph.core.types import Noisy

__all__ = ["DenoisingWeight", "EDMWeight", "EpsilonWeight", "SNRClipped", "SampleWeight"]


def weighted_denoising_loss(denoised: Tensor, x0: Tensor, noisy: Noisy, weight: DenoisingWeight) -> Tensor:
    """E[ lambda(s) |mu - x0|^2 ] [], mean over samples and dimensions.

    Args:
        denoised: mu(x_t) [B, ...], with its graph.
        x0: the clean samples [B, ...] that ``noisy`` was made from.
        noisy: the noisy samples.
        weight: lambda.
    """
    error = (denoised - x0).square().flatten(1).mean(1)
    return (weight(noisy) * error).mean()


class DenoisingWeight:
    """Base class."""

    def __call__(self, noisy: Noisy) -> Tensor:
        """lambda [B] > 0 at the noise levels of ``noisy``."""
        raise NotImplementedError


class EDMWeight(DenoisingWeight):
    """lambda = (s^2 + sigma_data^2) / (s sigma_data)^2: equal weight at initialisation (Karras et al. 2022, "EDM").

    Args:
        sigma_data: standard deviation of the clean data, > 0.
    """

    def __init__(self, *, sigma_data: Scale = 0.5):
        self.sigma_data = sigma_data

    def __call__(self, noisy):
        s = noisy.sigma / noisy.alpha
        return (s.square() + self.sigma_data**2) / (s * self.sigma_data).square()


class EpsilonWeight(DenoisingWeight):
    """lambda = 1 / s^2: the mean squared error of the predicted noise (Ho et al. 2020; DMD2 on Stable Diffusion)."""

    def __call__(self, noisy):
        return (noisy.alpha / noisy.sigma).square()


class SampleWeight(DenoisingWeight):
    """lambda = 1: the mean squared error of mu itself (f-distill on Stable Diffusion)."""

    def __call__(self, noisy):
        return torch.ones_like(noisy.sigma)


class SNRClipped(DenoisingWeight):
    """lambda = min(1 / s^2, limit): Min-SNR (Hang et al. 2023), which keeps low noise from outweighing the rest.

    Args:
        limit: gamma there, > 0; the paper takes 5.
    """

    def __init__(self, *, limit: Positive = 5.0):
        self.limit = limit

    def __call__(self, noisy):
        return (noisy.alpha / noisy.sigma).square().clamp_max(self.limit)
