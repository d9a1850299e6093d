"""One-step students: x0 = G(z), z ~ N(0, I)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.draws import SampleDraws
from ratiograph.core.randomness import integers, normal
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.denoisers import EDM

__all__ = ["OneStep", "OneStepDDPM"]


class OneStep(nn.Module):
    """G(z) = mu(sigma_init z; sigma_init): a denoiser asked once, at its own input noise level.

    Args:
        denoiser: the network; starting from the teacher's weights, G's samples begin as its blurry guesses.
        sigma_init: noise level of the input: 2.5 in SiD and score-free training, 80 in f-distill on EDM.
    """

    def __init__(self, *, denoiser: EDM, sigma_init: float = 2.5):
        super().__init__()
        if sigma_init <= 0:
            raise ValueError(f"OneStep.sigma_init={sigma_init} must be positive")
        self.denoiser, self.sigma_init = denoiser, sigma_init

    @property
    def captioned(self) -> bool:
        """Whether the network is told captions."""
        return getattr(getattr(self.denoiser, "network", None), "text_width", None) is not None

    def noise(self, samples: int, generator: torch.Generator) -> Tensor:
        """z [samples, ...] ~ N(0, I) on the generator's device."""
        kind = next(self.parameters()).dtype
        return normal((samples, *self.denoiser.shape), generator, torch.promote_types(kind, torch.float32))

    def noise_of(self, draws: SampleDraws) -> Tensor:
        """z [n, ...] ~ N(0, I) float32, each sample's own."""
        return draws.normal(self.denoiser.shape)

    def condition(self, samples: int, generator: torch.Generator) -> Condition:
        """Conditions to sample under: uniform labels for a conditional network."""
        classes = self.denoiser.network.classes
        if not classes:
            return Condition()
        return Condition(integers(0, classes, samples, generator))

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        """x0 [B, ...] of noise ``z`` [B, ...]."""
        sigma = z.new_full((z.shape[0],), self.sigma_init)
        return self.denoiser.denoise(Noisy(self.sigma_init * z, sigma, torch.ones_like(sigma), sigma), condition)


class OneStepDDPM(OneStep):
    """G(z) = mu(x_T = z) at step T of a discrete process: z stands for x_T itself, as DMD2 starts Stable Diffusion.

    ``OneStep`` at the same noise level would put sigma_T z there, which at T = 399 is visibly less.

    Args:
        denoiser: the network.
        timestep: T, an index of the process: 999 for SD 1.5, 399 for SDXL in DMD2.
        process: the discrete process; Stable Diffusion's by default.
    """

    def __init__(self, *, denoiser: EDM, timestep: int = 999, process: ScaledLinearDDPM | None = None):
        process = ScaledLinearDDPM() if process is None else process
        last = int(process.t_range[1])
        if not 0 <= timestep <= last:
            raise ValueError(f"OneStepDDPM.timestep={timestep} must be a step of the process, 0 to {last}")
        alpha, sigma = (float(table[timestep]) for table in (process.alpha_table, process.sigma_table))
        super().__init__(denoiser=denoiser, sigma_init=sigma / alpha)
        self.timestep, self.process, self.alpha, self.sigma = timestep, process, alpha, sigma

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        t, alpha, sigma = (z.new_full((z.shape[0],), value) for value in (self.timestep, self.alpha, self.sigma))
        return self.denoiser.denoise(Noisy(z, t, alpha, sigma), condition)
