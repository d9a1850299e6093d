"""Forward noising processes: x_t = alpha(t) x0 + sigma(t) noise, noise ~ N(0, I).

Notation: ``t`` [B] is the process's own time, ``alpha`` and ``sigma`` [B] its scales. ``sigma / alpha`` grows with
``t`` from (almost) 0; a denoiser at (alpha, sigma) is the variance-exploding one at x_t / alpha and sigma / alpha,
which is why any denoiser works under any process here.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from ratiograph.core.domains import Scale
from ratiograph.core.types import Noisy, expand

__all__ = ["NoisingProcess", "RectifiedFlow", "ScaledLinearDDPM", "VarianceExploding", "VariancePreserving"]


class NoisingProcess:
    """Base class. A process is fixed by ``alpha_sigma`` and by the inverse of sigma / alpha."""

    t_range: tuple[float, float]
    """Smallest and largest time the process is meant for; what ``times.Uniform`` scales its fractions by."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scales (alpha [B], sigma [B]) at times ``t`` [B]."""
        raise NotImplementedError

    def time_of(self, relative_sigma: Tensor) -> Tensor:
        """The time t [B] at which sigma(t) / alpha(t) equals ``relative_sigma`` [B] > 0."""
        raise NotImplementedError

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Noisy:
        """x_t = alpha x0 + sigma noise for ``x0`` and ``noise`` [B, ...] at ``t`` [B]."""
        alpha, sigma = self.alpha_sigma(t)
        alpha, sigma = alpha.to(x0.dtype), sigma.to(x0.dtype)
        return Noisy(expand(alpha, x0) * x0 + expand(sigma, x0) * noise, t, alpha, sigma)


class VarianceExploding(NoisingProcess):
    """alpha = 1, sigma = t (Karras et al. 2022, "EDM", Table 1).

    Args:
        sigma_min: smallest noise level.
        sigma_max: largest noise level.
    """

    def __init__(self, *, sigma_min: Scale = 0.002, sigma_max: Scale = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max} must satisfy 0 < sigma_min < sigma_max")
        self.t_range = (sigma_min, sigma_max)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def time_of(self, relative_sigma: Tensor) -> Tensor:
        return relative_sigma


class VariancePreserving(NoisingProcess):
    """alpha = exp(-B/2), sigma^2 = 1 - alpha^2, B(t) = beta_min t + (beta_max - beta_min) t^2 / 2 (Song et al. 2021).

    Args:
        beta_min: rate of noising at t = 0.
        beta_max: rate of noising at t = 1.
    """

    t_range = (1e-3, 1.0)

    def __init__(self, *, beta_min: Scale = 0.1, beta_max: Scale = 20.0):
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min={beta_min} and beta_max={beta_max} must satisfy 0 < beta_min < beta_max")
        self.beta_min, self.beta_slope = beta_min, beta_max - beta_min

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.beta_min * t + self.beta_slope * t.square() / 2
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def time_of(self, relative_sigma: Tensor) -> Tensor:
        integral = torch.log1p(relative_sigma.square())
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_slope * integral)
        return 2 * integral / (root + self.beta_min)


class ScaledLinearDDPM(NoisingProcess):
    """Stable Diffusion's discrete process: sqrt(beta_i) linear in i, alpha_i^2 = prod_{j<=i} (1 - beta_j).

    Times are step indices 0 .. steps - 1 (floats are rounded to the nearest step).

    Args:
        steps: number of discrete steps.
        beta_start: beta at index 0.
        beta_end: beta at the last index.
    """

    def __init__(
        self,
        *,
        steps: Annotated[int, Interval(ge=2, le=1_000_000)] = 1000,
        beta_start: Annotated[float, Interval(gt=0, lt=1)] = 0.00085,
        beta_end: Annotated[float, Interval(gt=0, lt=1)] = 0.012,
    ):
        if not (steps >= 2 and 0 < beta_start < beta_end < 1):
            raise ValueError("ScaledLinearDDPM needs steps >= 2 and 0 < beta_start < beta_end < 1")
        self.steps, self.beta_start, self.beta_end = steps, beta_start, beta_end
        self.t_range = (0.0, steps - 1.0)
        # On the CPU even when the graph is built on the meta device: the table is data, not a weight.
        self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64, device="cpu").square()
        log_alpha2 = torch.log1p(-self.betas).cumsum(0)
        self.alpha_table = torch.exp(log_alpha2 / 2)
        self.sigma_table = torch.sqrt(-torch.expm1(log_alpha2))
        self.log_relative_table = torch.log(self.sigma_table / self.alpha_table)

    def __str__(self) -> str:
        return f"steps={self.steps}, beta_start={self.beta_start:.6g}, beta_end={self.beta_end:.6g}"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = t.round().long()
        dtype = t.dtype if t.is_floating_point() else torch.get_default_dtype()
        alpha, sigma = (table.to(t.device)[index].to(dtype) for table in (self.alpha_table, self.sigma_table))
        return alpha, sigma

    def time_of(self, relative_sigma: Tensor) -> Tensor:
        table = self.log_relative_table.to(relative_sigma.device)
        target = relative_sigma.double().log()
        right = torch.searchsorted(table, target).clamp(1, len(table) - 1)
        nearer_left = target - table[right - 1] < table[right] - target
        return (right - nearer_left.long()).to(relative_sigma.dtype)


class RectifiedFlow(NoisingProcess):
    """alpha = 1 - t, sigma = t, the straight path of flow matching (Liu et al. 2022; Lipman et al. 2022)."""

    t_range = (1e-3, 1 - 1e-3)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def time_of(self, relative_sigma: Tensor) -> Tensor:
        return relative_sigma / (1 + relative_sigma)
