"""One-step students: x0 = G(z), z ~ N(0, I)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratiograph.denoisers import EDM
from ratiograph.types import Condition, Noisy

__all__ = ["OneStep"]


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

    def noise(self, samples: int, generator: torch.Generator) -> Tensor:
        """z [samples, ...] ~ N(0, I) on the generator's device."""
        return torch.randn((samples, *self.denoiser.shape), generator=generator, device=generator.device)

    def condition(self, samples: int, generator: torch.Generator) -> Condition:
        """Conditions to sample under: uniform labels for a conditional network."""
        classes = self.denoiser.network.classes
        if not classes:
            return Condition()
        return Condition(torch.randint(classes, (samples,), generator=generator, device=generator.device))

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        """x0 [B, ...] of noise ``z`` [B, ...]."""
        sigma = z.new_full((z.shape[0],), self.sigma_init)
        return self.denoiser.denoise(Noisy(self.sigma_init * z, sigma, torch.ones_like(sigma), sigma), condition)
