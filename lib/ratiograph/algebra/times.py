"""p(t), how training times are drawn, and w(t), how they are weighted.

Notation: a ``TimeSampler`` returns ``t`` [B] in the units of the noising process it is given. The gradient of a term
with respect to x0 is w(t) alpha_t v(x_t), so a ``TimeWeight`` returns w [B]; it may look at the evaluation, because
the normaliser of DMD depends on the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ratiograph.algebra.noising import NoisingProcess
from ratiograph.core import randomness
from ratiograph.core.contracts import Evaluation
from ratiograph.core.domains import Exponent, Fraction, NonNegativeInt, Positive, Scale, UnitInterval

__all__ = [
    "DDPMSteps",
    "FixedSigma",
    "InverseTeacherError",
    "KarrasIndex",
    "LogNormalSigma",
    "LogitNormal",
    "SigmaSquared",
    "TimeSampler",
    "TimeWeight",
    "Uniform",
    "UnitTimeWeight",
]


class TimeSampler:
    """Base class of p(t)."""

    def __call__(self, noising: NoisingProcess, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draws ``t`` [batch_size] float32 on the generator's device."""
        raise NotImplementedError

    def quantile(self, noising: NoisingProcess, t: Tensor) -> Tensor:
        """u [B] in [0, 1]: the share of p(t) below ``t`` [B], so that bins equal in u get equally many samples."""
        raise NotImplementedError


def _relative_sigma(noising: NoisingProcess, t: Tensor) -> Tensor:
    alpha, sigma = noising.alpha_sigma(t)
    return sigma / alpha


def _check_fractions(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low} and high={high} are fractions of the range and must satisfy 0 <= low < high <= 1")


class Uniform(TimeSampler):
    """t uniform in a fraction [low, high] of the process's own range, as Di-Bregman's U[0, 1] and U[0, 0.95].

    Args:
        low: fraction in [0, 1) of the range at which sampling starts.
        high: fraction in (0, 1] at which it ends.
    """

    def __init__(self, *, low: Fraction = 0.0, high: UnitInterval = 1.0):
        _check_fractions(low, high)
        self.low, self.high = low, high

    def __call__(self, noising, batch_size, generator):
        start, end = noising.t_range
        fraction = self.low + (self.high - self.low) * randomness.uniform((batch_size,), generator)
        return start + (end - start) * fraction

    def quantile(self, noising, t):
        start, end = noising.t_range
        return (((t - start) / (end - start) - self.low) / (self.high - self.low)).clamp(0, 1)


class KarrasIndex(TimeSampler):
    """sigma = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho with u ~ U[low, high] (EDM Eq. 5).

    u grows with the noise. SiD's "first 800 of 1000" is ``high=0.8`` (sigma <= 24.4); f-distill's index 2..998 is
    ``low=0.002, high=0.998``.

    Args:
        sigma_min: noise level at u = 0.
        sigma_max: noise level at u = 1.
        rho: how strongly small noise levels are favoured.
        low: smallest u, in [0, 1).
        high: largest u, in (0, 1].
    """

    def __init__(
        self,
        *,
        sigma_min: Scale = 0.002,
        sigma_max: Scale = 80.0,
        rho: Exponent = 7.0,
        low: Fraction = 0.0,
        high: UnitInterval = 1.0,
    ):
        _check_fractions(low, high)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max} must satisfy 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max, self.rho, self.low, self.high = sigma_min, sigma_max, rho, low, high

    def __call__(self, noising, batch_size, generator):
        u = self.low + (self.high - self.low) * randomness.uniform((batch_size,), generator)
        start, end = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return noising.time_of((start + u * (end - start)) ** self.rho)

    def quantile(self, noising, t):
        start, end = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        u = (_relative_sigma(noising, t) ** (1 / self.rho) - start) / (end - start)
        return ((u - self.low) / (self.high - self.low)).clamp(0, 1)


class LogNormalSigma(TimeSampler):
    """log(sigma / alpha) ~ N(mean, std^2), the training distribution of EDM (its P_mean, P_std).

    Args:
        mean: mean of log sigma.
        std: standard deviation of log sigma, > 0.
    """

    def __init__(self, *, mean: float = -1.2, std: Positive = 1.2):
        self.mean, self.std = mean, std

    def __call__(self, noising, batch_size, generator):
        normal = randomness.normal((batch_size,), generator)
        return noising.time_of(torch.exp(self.mean + self.std * normal))

    def quantile(self, noising, t):
        return torch.special.ndtr((_relative_sigma(noising, t).log() - self.mean) / self.std)


class FixedSigma(TimeSampler):
    """sigma / alpha = ``sigma`` always: single-level denoising score matching (arXiv 2502.08005 §6).

    Args:
        sigma: the noise level, > 0.
    """

    def __init__(self, *, sigma: Scale):
        self.sigma = sigma

    def __call__(self, noising, batch_size, generator):
        return noising.time_of(torch.full((batch_size,), self.sigma, device=generator.device))

    def quantile(self, noising, t):
        return torch.full_like(t, 0.5)


class DDPMSteps(TimeSampler):
    """Integer steps uniform in {low, ..., high}, for discrete processes (DMD's [20, 980]).

    Args:
        low: first step, >= 0.
        high: last step, inclusive.
    """

    def __init__(self, *, low: NonNegativeInt = 20, high: NonNegativeInt = 980):
        if not 0 <= low <= high:
            raise ValueError(f"low={low} and high={high} must satisfy 0 <= low <= high")
        self.low, self.high = low, high

    def __call__(self, noising, batch_size, generator):
        if self.high > noising.t_range[1]:
            raise ValueError(
                f"DDPMSteps.high={self.high} is beyond the process's last step {noising.t_range[1]:g}: use it with "
                "ScaledLinearDDPM, or choose Uniform, KarrasIndex, LogNormalSigma or LogitNormal"
            )
        draw = randomness.integers(self.low, self.high + 1, batch_size, generator)
        return draw.float()

    def quantile(self, noising, t):
        return ((t - self.low + 0.5) / (self.high - self.low + 1)).clamp(0, 1)


class LogitNormal(TimeSampler):
    """t = sigmoid(mean + std n), n ~ N(0, 1): the flow models' choice (Esser et al. 2024), for processes on [0, 1].

    Args:
        mean: location of the logit.
        std: scale of the logit, > 0.
    """

    def __init__(self, *, mean: float = 0.0, std: Positive = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, noising, batch_size, generator):
        normal = randomness.normal((batch_size,), generator)
        return torch.sigmoid(self.mean + self.std * normal).clamp(*noising.t_range)

    def quantile(self, noising, t):
        return torch.special.ndtr((torch.logit(t) - self.mean) / self.std)


class TimeWeight:
    """Base class of w(t)."""

    requires: tuple[str, ...] = ()
    """Nodes of the graph that must exist."""

    def __call__(self, evaluation: Evaluation) -> Tensor:
        """w [B] > 0 for the samples of ``evaluation``."""
        raise NotImplementedError


class UnitTimeWeight(TimeWeight):
    """w = 1: the plain integral over p(t) of the divergences D_h(q_t || p_t)."""

    def __call__(self, evaluation):
        return torch.ones_like(evaluation.noisy.sigma)


class SigmaSquared(TimeWeight):
    """w = sigma^2 (arXiv 2502.08005); with ``ScoreDifference`` the gradient is omega alpha^2 (mu_q - mu_p)."""

    def __call__(self, evaluation):
        return evaluation.noisy.sigma.square()


class InverseTeacherError(TimeWeight):
    """w = (sigma / alpha)^2 / mean|x0 - mu_p|, DMD's per-sample normaliser (Yin et al. 2024, Eq. 8).

    With ``ScoreDifference`` the gradient becomes omega (mu_q - mu_p) / mean|x0 - mu_p|. Needs a teacher.

    Args:
        floor: smallest mean absolute error divided by, in units of the data.
    """

    requires = ("teacher",)

    def __init__(self, *, floor: Scale = 1e-4):
        self.floor = floor

    def __call__(self, evaluation):
        noisy = evaluation.noisy
        error = (evaluation.x0 - evaluation.teacher_denoised).abs().flatten(1).mean(1)
        return (noisy.sigma / noisy.alpha).square() / error.clamp_min(self.floor)
