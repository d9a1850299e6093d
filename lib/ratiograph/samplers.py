"""Many-step samplers of a teacher.

Notation: sigma_0 > ... > sigma_{n-1} > sigma_n = 0 are noise levels at alpha = 1, x the running sample [B, ...].
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ratiograph.denoisers import Denoiser
from ratiograph.types import Condition, Noisy

__all__ = ["HeunSampler"]


class HeunSampler:
    """Deterministic second-order sampler of EDM (Karras et al. 2022, Algorithm 1) on its rho-schedule (Eq. 5).

    n steps cost 2n - 1 evaluations of the denoiser: 18 steps are 35, 3 steps are 5, and one step is a single one.

    Args:
        steps: n, at least 1.
        sigma_min: last noise level before 0.
        sigma_max: first noise level.
        rho: exponent of the schedule.
    """

    def __init__(self, *, steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        if steps < 1:
            raise ValueError(f"HeunSampler.steps={steps} must be at least 1")
        self.steps, self.sigma_min, self.sigma_max, self.rho = steps, sigma_min, sigma_max, rho

    @classmethod
    def for_evaluations(cls, evaluations: int) -> HeunSampler:
        """The sampler that costs exactly ``evaluations`` (odd) passes of the denoiser."""
        if evaluations % 2 == 0:
            raise ValueError(
                f"Heun's method takes an odd number of evaluations, not {evaluations}: try {evaluations + 1}"
            )
        return cls(steps=(evaluations + 1) // 2)

    def sigmas(self) -> list[float]:
        """The n + 1 noise levels, the last of them 0."""
        start, end = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        fractions = [i / max(self.steps - 1, 1) for i in range(self.steps)]
        return [*((start + f * (end - start)) ** self.rho for f in fractions), 0.0]

    @torch.no_grad()
    def sample(self, denoiser: Denoiser, noise: Tensor, condition: Condition) -> Tensor:
        """Samples x0 [B, ...] from unit-variance ``noise`` [B, ...]."""
        sigmas = self.sigmas()

        def slope(x: Tensor, sigma: float) -> Tensor:
            level = x.new_full((x.shape[0],), sigma)
            return (x - denoiser.denoise(Noisy(x, level, torch.ones_like(level), level), condition)) / sigma

        x = noise * sigmas[0]
        for sigma, following in pairwise(sigmas):
            first = slope(x, sigma)
            euler = x + (following - sigma) * first
            x = euler if following == 0 else x + (following - sigma) * (first + slope(euler, following)) / 2
        return x
