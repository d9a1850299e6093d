"""Weightings omega of the one field v = omega(r) (s_q - s_p) - omega(r*) grad log r*.

Notation: l = ``log_ratio`` = log p/q [B], rho = e^l = p/q (f-distill's ratio), r = e^(-l) = q/p (Bregman's ratio).
A weighting is omega(l) = h''(r) r = f''(rho) rho^2 for a convex h (Di-Bregman, arXiv 2510.16983) or f (f-distill,
arXiv 2502.15681), and f(rho) = rho h(1/rho): rows that share omega are one method under two names. Everything is
computed from log omega, so that no ratio overflows before it is normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratiograph.algebra.noising import NoisingProcess
from ratiograph.algebra.times import TimeSampler
from ratiograph.core.domains import NonNegative

__all__ = [
    "BE",
    "KL",
    "LR",
    "LS",
    "SBA",
    "CustomWeighting",
    "ForwardKL",
    "Jeffreys",
    "JensenShannon",
    "ReverseKL",
    "SoftenedReverseKL",
    "SquaredHellinger",
    "Weighting",
]


class Weighting(nn.Module):
    """Base class: a row gives ``log_weight``, and ``h`` where it has a closed form.

    A module, because a normaliser keeps running statistics; a row itself has no state.
    """

    def connect(self, noising: NoisingProcess, times: TimeSampler) -> None:
        """Called once by the root with the process and p(t) of the objective, for wrappers that bin over t."""

    def log_weight(self, log_ratio: Tensor, t: Tensor) -> Tensor:
        """log omega [B] at ``log_ratio`` [B] and times ``t`` [B]; a ValueError where a subclass does not define it."""
        raise ValueError(f"{type(self).__name__} has no weights: define log_weight(self, log_ratio, t), log omega [B]")

    def forward(self, log_ratio: Tensor, t: Tensor) -> Tensor:
        """omega [B] >= 0."""
        return self.log_weight(log_ratio, t).exp()

    @property
    def needs_ratio(self) -> bool:
        """Whether omega varies with l at all; KL's does not, so it runs without a ratio estimator."""
        return True

    @property
    def row(self) -> Weighting:
        """The row of the table itself, without the wrappers round it."""
        return self

    @property
    def has_h(self) -> bool:
        """Whether h has a closed form."""
        return type(self).h is not Weighting.h

    def log_pair(self, log_ratio: Tensor, target_log_ratio: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log omega(r), log omega(r*)) [B] each, where ``target_log_ratio`` = -log r*.

        A normaliser overrides it: both must be scaled alike, or the field would not vanish at r = r*.
        """
        return self.log_weight(log_ratio, t), self.log_weight(target_log_ratio, t)

    def pair(self, log_ratio: Tensor, target_log_ratio: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(omega(r), omega(r*)) [B] each, where ``target_log_ratio`` = -log r*."""
        log_weight, log_target_weight = self.log_pair(log_ratio, target_log_ratio, t)
        return log_weight.exp(), log_target_weight.exp()

    def discriminator_coefficient(self, d: Tensor) -> Tensor:
        """What multiplies -grad_x D in the field written with D = sigmoid(l) in (0, 1) [B] instead of l.

        The blog "On the connection between DMD and GAN" (Zhu 2025) boxes h''((1 - D)/D) / D^2 = omega(l) / (D (1 - D)),
        because grad D = D (1 - D) grad l; for KL it is 1 / (D (1 - D)), so that the field is -grad logit D.
        """
        return self(torch.logit(d), torch.zeros_like(d)) / (d * (1 - d))

    def h(self, r: Tensor) -> Tensor:
        """Bregman's convex generator at r = q/p > 0, with h''(r) r = omega; fixed up to an affine function."""
        raise ValueError(f"{type(self).__name__} has no closed form of h")

    def f(self, rho: Tensor) -> Tensor:
        """f-distill's generator f(rho) = rho h(1/rho) at rho = p/q > 0, with f''(rho) rho^2 = omega."""
        return rho * self.h(1 / rho)


class KL(Weighting):
    """omega = 1, h = r log r - r: KL(q||p). DMD's, and DiKL with the direction -grad l."""

    needs_ratio = False

    def log_weight(self, log_ratio, t):
        return torch.zeros_like(log_ratio)

    def h(self, r):
        return torch.xlogy(r, r) - r


class ReverseKL(KL):
    """f-distill's name of ``KL``: f = -log rho."""


class LR(Weighting):
    """omega = sigmoid(l), h = r log r - (1 + r) log(1 + r): logistic regression; the saturating GAN with -grad l."""

    def log_weight(self, log_ratio, t):
        return F.logsigmoid(log_ratio)

    def h(self, r):
        return torch.xlogy(r, r) - (1 + r) * torch.log1p(r)


class JensenShannon(LR):
    """f-distill's name of ``LR``: f = rho log rho - (rho + 1) log((rho + 1) / 2); DiJS with -grad l."""


class SoftenedReverseKL(Weighting):
    """omega = sigmoid(-l), f = (rho + 1) log((rho + 1) / (2 rho)): DiRM, the non-saturating GAN, with -grad l."""

    def log_weight(self, log_ratio, t):
        return F.logsigmoid(-log_ratio)

    def h(self, r):
        return (1 + r) * torch.log1p(r) - r


class BE(Weighting):
    """omega = e^l, h = -log r: binary entropy of Di-Bregman; mode-covering."""

    def log_weight(self, log_ratio, t):
        return log_ratio

    def h(self, r):
        return -torch.log(r)


class ForwardKL(BE):
    """f-distill's name of ``BE``: f = rho log rho."""


class Jeffreys(Weighting):
    """omega = 1 + e^l, f = (rho - 1) log rho: the sum of both KL divergences."""

    def log_weight(self, log_ratio, t):
        return F.softplus(log_ratio)

    def h(self, r):
        return torch.xlogy(r, r) - r - torch.log(r)


class SquaredHellinger(Weighting):
    """omega = e^(l/2) / 4, h = -sqrt(r), f = 1 - sqrt(rho) up to a constant."""

    def log_weight(self, log_ratio, t):
        return log_ratio / 2 - math.log(4)

    def h(self, r):
        return -torch.sqrt(r)


class LS(Weighting):
    """omega = e^(-l), h = r^2 / 2: least squares of Di-Bregman; mode-seeking."""

    def log_weight(self, log_ratio, t):
        return -log_ratio

    def h(self, r):
        return r.square() / 2


class SBA(Weighting):
    """omega = e^(-lam l), the scaled Bregman divergences: h = (r^(1+lam) - r) / (lam (lam + 1)) up to affine terms.

    lam = 0 is KL, 1 is LS, -1 is BE, -1/2 squared Hellinger times four.

    Args:
        lam: Di-Bregman's lambda; it found 3 to 10 best on CIFAR-10.
    """

    def __init__(self, *, lam: float = 1.0):
        super().__init__()
        self.lam = lam

    def log_weight(self, log_ratio, t):
        return -self.lam * log_ratio

    def h(self, r):
        if self.lam == 0:
            return torch.xlogy(r, r) - r
        if self.lam == -1:
            return -torch.log(r)
        return (r ** (1 + self.lam) - r) / (self.lam * (self.lam + 1))


class CustomWeighting(Weighting):
    """omega given as a table, linear in l between its points and constant outside: any continuous omega >= 0 is the
    weighting of some f-divergence (f-distill, Proposition 1).

    Args:
        log_ratios: increasing values of l, at least two.
        weights: omega >= 0 at each of them, not all zero.

    Raises:
        ValueError: for lists of different lengths, unordered l or negative omega.
    """

    def __init__(self, *, log_ratios: Sequence[float], weights: Sequence[NonNegative]):
        super().__init__()
        if len(log_ratios) != len(weights) or len(log_ratios) < 2:
            raise ValueError(
                f"CustomWeighting needs as many weights as log_ratios, at least two; got {len(weights)} and "
                f"{len(log_ratios)}"
            )
        if any(b <= a for a, b in pairwise(log_ratios)):
            raise ValueError(f"CustomWeighting.log_ratios must increase: {list(log_ratios)}")
        if max(weights) <= 0:
            raise ValueError(f"CustomWeighting.weights must not all be zero: {list(weights)}")
        self.log_ratios, self.weights = tuple(log_ratios), tuple(weights)

    def log_weight(self, log_ratio, t):
        grid, values = log_ratio.new_tensor(self.log_ratios), log_ratio.new_tensor(self.weights)
        inside = log_ratio.clamp(self.log_ratios[0], self.log_ratios[-1])
        right = torch.searchsorted(grid, inside).clamp(1, len(self.log_ratios) - 1)
        share = (inside - grid[right - 1]) / (grid[right] - grid[right - 1])
        return torch.lerp(values[right - 1], values[right], share).log()
