"""Many-step samplers of a teacher.

Notation: sigma_0 > ... > sigma_{n-1} > sigma_n = 0 are noise levels at alpha = 1, x the running sample [B, ...], and
dx/dsigma = (x - mu(x; sigma)) / sigma the probability-flow ODE. A denoiser of any noising process is evaluated in this
variance-exploding view, at x / alpha and sigma / alpha, so one sampler serves them all; ``DDIMSampler`` alone visits
the steps of a discrete process, where a network that was trained at whole steps is most accurate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Protocol

import torch
from annotated_types import Ge
from torch import Tensor

from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.contracts import Denoiser
from ratiograph.core.domains import Exponent, NonNegative, NonNegativeInt, OrInfinite, PositiveInt, Scale
from ratiograph.core.types import Condition, Noisy

__all__ = [
    "DDIMSampler",
    "EulerSampler",
    "HeunSampler",
    "ManyStepSampler",
    "StochasticHeunSampler",
    "TrailingDDIMSampler",
]

Slope = Callable[[Tensor, float], Tensor]
"""(x [B, ...], sigma) => dx/dsigma [B, ...]; one pass of the denoiser."""


class Draws(Protocol):
    """Source of a sampler's own noise: `core.draws.SampleDraws` or `core.draws.GeneratorDraws`."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers [B, *shape]."""


class ManyStepSampler:
    """Base class."""

    @property
    def evaluations(self) -> int:
        """Passes of the denoiser for one sample."""
        raise NotImplementedError

    def sample(self, denoiser: Denoiser, noise: Tensor, condition: Condition, draws: Draws | None = None) -> Tensor:
        """Samples x0 [B, ...] from unit-variance ``noise`` [B, ...], in its dtype.

        Args:
            denoiser: the teacher.
            noise: z ~ N(0, I), where the path starts.
            condition: of the B samples.
            draws: further noise of a stochastic sampler, each sample's own; torch's default generator if None.
        """
        raise NotImplementedError


class KarrasSampler(ManyStepSampler):
    """Base class of samplers on EDM's rho-schedule (Karras et al. 2022, Eq. 5).

    Args:
        steps: n, at least 1.
        sigma_min: last noise level before 0.
        sigma_max: first noise level.
        rho: exponent of the schedule.
    """

    def __init__(
        self, *, steps: PositiveInt = 18, sigma_min: Scale = 0.002, sigma_max: Scale = 80.0, rho: Exponent = 7.0
    ):
        if steps < 1:
            raise ValueError(f"{type(self).__name__}.steps={steps} must be at least 1")
        self.steps, self.sigma_min, self.sigma_max, self.rho = steps, sigma_min, sigma_max, rho

    def sigmas(self) -> list[float]:
        """The n + 1 noise levels, the last of them 0."""
        start, end = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        fractions = [i / max(self.steps - 1, 1) for i in range(self.steps)]
        return [*((start + f * (end - start)) ** self.rho for f in fractions), 0.0]

    def step(self, slope: Slope, x: Tensor, sigma: float, following: float, draws: Draws | None) -> Tensor:
        """The sample [B, ...] at the noise level ``following``, from ``x`` [B, ...] at ``sigma``."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, denoiser, noise, condition, draws=None):
        def slope(x: Tensor, sigma: float) -> Tensor:
            level = x.new_full((x.shape[0],), sigma)
            return (x - denoiser.denoise(Noisy(x, level, torch.ones_like(level), level), condition)) / sigma

        sigmas = self.sigmas()
        x = noise * sigmas[0]
        for sigma, following in pairwise(sigmas):
            x = self.step(slope, x, sigma, following, draws)
        return x


class EulerSampler(KarrasSampler):
    """First-order sampler: x + (sigma_{i+1} - sigma_i) dx/dsigma, which is DDIM at alpha = 1 (Song et al. 2020).

    n steps cost n evaluations. Arguments as in `HeunSampler`.
    """

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(self, slope, x, sigma, following, draws):
        return x + (following - sigma) * slope(x, sigma)


class HeunSampler(KarrasSampler):
    """Deterministic second-order sampler of EDM (Karras et al. 2022, Algorithm 1) on its rho-schedule (Eq. 5).

    n steps cost 2n - 1 evaluations of the denoiser: 18 steps are 35, 3 steps are 5, and one step is a single one.

    Args:
        steps: n, at least 1.
        sigma_min: last noise level before 0.
        sigma_max: first noise level.
        rho: exponent of the schedule.
    """

    @classmethod
    def for_evaluations(cls, evaluations: int) -> HeunSampler:
        """The sampler that costs exactly ``evaluations`` (odd) passes of the denoiser."""
        if evaluations % 2 == 0:
            raise ValueError(
                f"Heun's method needs an odd number of evaluations, not {evaluations}: try {evaluations + 1}"
            )
        return cls(steps=(evaluations + 1) // 2)

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def step(self, slope, x, sigma, following, draws):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        return euler if following == 0 else x + (following - sigma) * (first + slope(euler, following)) / 2


class StochasticHeunSampler(HeunSampler):
    """Heun's steps, with fresh noise added before each (Karras et al. 2022, Algorithm 2).

    Where s_min <= sigma_i <= s_max, x is first noised to sigma_i (1 + gamma), gamma = min(s_churn / n, sqrt(2) - 1),
    with noise of standard deviation s_noise. The defaults are EDM's for its ImageNet-64 network, at 256 steps; for the
    CIFAR-10 networks of VP it takes 30, 0.01, 1 and 1.007, for those of VE 80, 0.05, 1 and 1.007 (Table 5).

    Args:
        steps: n, at least 1.
        s_churn: amount of noise over the whole path, at least 0; 0 is `HeunSampler`.
        s_min: lowest noise level at which noise is added.
        s_max: highest one.
        s_noise: standard deviation of the noise, a little above 1 against the denoiser's loss of detail.
        sigma_min: last noise level before 0.
        sigma_max: first noise level.
        rho: exponent of the schedule.
    """

    def __init__(
        self,
        *,
        steps: PositiveInt = 256,
        s_churn: NonNegative = 40.0,
        s_min: NonNegative = 0.05,
        s_max: Annotated[float, Ge(0), OrInfinite()] = 50.0,
        s_noise: NonNegative = 1.003,
        sigma_min: Scale = 0.002,
        sigma_max: Scale = 80.0,
        rho: Exponent = 7.0,
    ):
        super().__init__(steps=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise

    def step(self, slope, x, sigma, following, draws):
        gamma = min(self.s_churn / self.steps, math.sqrt(2) - 1) if self.s_min <= sigma <= self.s_max else 0.0
        if gamma == 0:
            return super().step(slope, x, sigma, following, draws)
        noisier = sigma * (1 + gamma)
        noise = torch.randn_like(x) if draws is None else draws.normal(x.shape[1:]).to(x)
        x = x + self.s_noise * math.sqrt(noisier**2 - sigma**2) * noise
        return super().step(slope, x, noisier, following, draws)


class DDIMSampler(ManyStepSampler):
    """DDIM without noise (Song et al. 2020, Eq. 12 at eta = 0) on the steps of a discrete process, as diffusers has it.

    x' = alpha' mu + sigma' (x - alpha mu) / sigma from each chosen step to the next, starting from x = z. Steps are
    chosen as Stable Diffusion's scheduler does by default ("leading"): k floor(T / n) + offset for k = n - 1, ..., 0,
    which never reaches the last one; a few steps need `TrailingDDIMSampler`.

    Args:
        steps: n, evaluations of the denoiser, 1 to T.
        process: the discrete process with T steps; Stable Diffusion's by default.
        offset: added to every step, at least 0; Stable Diffusion's is 1.
        clean_end: whether the last step ends at alpha = 1; Stable Diffusion ends at the process's first step.
    """

    def __init__(
        self,
        *,
        steps: PositiveInt = 50,
        process: ScaledLinearDDPM | None = None,
        offset: NonNegativeInt = 1,
        clean_end: bool = False,
    ):
        self.process = ScaledLinearDDPM() if process is None else process
        self.steps, self.offset, self.clean_end = steps, offset, clean_end
        if not 1 <= steps <= self.total:
            raise ValueError(f"{type(self).__name__}.steps={steps} must be 1 to the process's {self.total}")
        if not 0 <= self.timesteps()[-1] <= self.timesteps()[0] < self.total:
            raise ValueError(f"{type(self).__name__}: {steps} steps and offset={offset} leave the process's steps")

    @property
    def evaluations(self) -> int:
        return self.steps

    @property
    def total(self) -> int:
        """T, the process's number of steps."""
        return len(self.process.alpha_table)

    def timesteps(self) -> list[int]:
        """The steps of the process at which the denoiser runs, noisiest first."""
        stride = self.total // self.steps
        return [k * stride + self.offset for k in reversed(range(self.steps))]

    def levels(self) -> list[tuple[float, float]]:
        """(alpha, sigma) at each of ``timesteps``, and at the end of the path."""
        alphas, sigmas = self.process.alpha_table.tolist(), self.process.sigma_table.tolist()
        levels = [(alphas[t], sigmas[t]) for t in [*self.timesteps(), 0]]
        return [*levels[:-1], (1.0, 0.0)] if self.clean_end else levels

    @torch.no_grad()
    def sample(self, denoiser, noise, condition, draws=None):
        x = noise
        for t, (level, (next_alpha, next_sigma)) in zip(self.timesteps(), pairwise(self.levels()), strict=True):
            alpha, sigma = level
            noisy = Noisy(x, *(x.new_full((x.shape[0],), value) for value in (t, alpha, sigma)))
            denoised = denoiser.denoise(noisy, condition)
            x = next_alpha * denoised + next_sigma * (x - alpha * denoised) / sigma
        return x


class TrailingDDIMSampler(DDIMSampler):
    """DDIM on steps counted from the last one, round(T - k T / n) - 1 for k = 0, ..., n - 1 (Lin et al. 2023).

    It starts at the process's last step and is the better choice for few steps.

    Args:
        steps: n, evaluations of the denoiser, 1 to T.
        process: the discrete process with T steps; Stable Diffusion's by default.
        clean_end: whether the last step ends at alpha = 1; Stable Diffusion ends at the process's first step.
    """

    def __init__(self, *, steps: PositiveInt = 8, process: ScaledLinearDDPM | None = None, clean_end: bool = False):
        super().__init__(steps=steps, process=process, offset=0, clean_end=clean_end)

    def timesteps(self):
        return [round(self.total - k * self.total / self.steps) - 1 for k in range(self.steps)]
