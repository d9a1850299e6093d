"""One-step students: x0 = G(z), z ~ N(0, I)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.domains import NonNegativeInt, Scale
from ratiograph.core.draws import SampleDraws
from ratiograph.core.randomness import integers, normal
from ratiograph.core.types import Condition, Noisy
from ratiograph.networks.denoisers import EDM

__all__ = ["OneStep", "OneStepDDPM"]


class OneStep(nn.Module):
    """G(z) = mu(sigma_init z; sigma_init): one pass of a denoiser at the noise level of its input.

    Args:
        denoiser: the network; with the teacher's weights, the first samples are the teacher's blurry estimates.
        sigma_init: noise level of the input: 2.5 in SiD and score-free training, 80 in f-distill on EDM.
    """

    def __init__(self, *, denoiser: EDM, sigma_init: Scale = 2.5):
        super().__init__()
        self.denoiser, self.sigma_init = denoiser, sigma_init

    @property
    def captioned(self) -> bool:
        """Whether the network is conditioned on captions."""
        return getattr(getattr(self.denoiser, "network", None), "text_width", None) is not None

    def noise(self, samples: int, generator: torch.Generator) -> Tensor:
        """z [samples, ...] ~ N(0, I) on the generator's device."""
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        return normal((samples, *self.denoiser.shape), generator, dtype)

    def noise_of(self, draws: SampleDraws) -> Tensor:
        """z [n, ...] ~ N(0, I) float32, each sample's own."""
        return draws.normal(self.denoiser.shape)

    def condition(self, samples: int, generator: torch.Generator) -> Condition:
        """Conditions to sample under: uniform labels for a conditional network."""
        classes = self.denoiser.network.classes
        return Condition(integers(0, classes, samples, generator)) if classes else Condition()

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        """x0 [B, ...] of noise ``z`` [B, ...]."""
        sigma = z.new_full((z.shape[0],), self.sigma_init)
        return self.denoiser.denoise(Noisy(self.sigma_init * z, sigma, torch.ones_like(sigma), sigma), condition)


class OneStepDDPM(OneStep):
    """G(z) = mu(x_T = z) at step T of a discrete process: z is x_T itself, as in DMD2's students of Stable Diffusion.

    ``OneStep`` at the same noise level would take x_T = sigma_T z, which at T = 399 is visibly less noise.

    Args:
        denoiser: the network.
        timestep: T, an index of the process: 999 for SD 1.5, 399 for SDXL in DMD2.
        process: the discrete process; None takes the denoiser's own, Stable Diffusion's where it has none.
    """

    def __init__(self, *, denoiser: EDM, timestep: NonNegativeInt = 999, process: ScaledLinearDDPM | None = None):
        own = denoiser.process
        process = process or own or ScaledLinearDDPM()
        if own is not None and str(process) != str(own):
            raise ValueError(f"OneStepDDPM.process has {process}, and its denoiser's has {own}: leave the line out")
        last = int(process.t_range[1])
        if not 0 <= timestep <= last:
            raise ValueError(f"OneStepDDPM.timestep={timestep} must be a step of the process, 0 to {last}")
        alpha, sigma = (float(table[timestep]) for table in (process.alpha_table, process.sigma_table))
        super().__init__(denoiser=denoiser, sigma_init=sigma / alpha)
        self.timestep, self.process, self.alpha, self.sigma = timestep, process, alpha, sigma

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        t, alpha, sigma = (z.new_full((z.shape[0],), value) for value in (self.timestep, self.alpha, self.sigma))
        return self.denoiser.denoise(Noisy(z, t, alpha, sigma), condition)
