"""Stable Diffusion as a denoiser of latents: teacher, student score and, asked once, student.

Notation: s = sigma / alpha and y = x_t / alpha, the variance-exploding view of a noisy latent. The native view is the
variance-preserving one, x' = alpha' y with alpha' = 1 / sqrt(s^2 + 1) and sigma' = s alpha', at the step index whose
sigma / alpha is nearest to s, as the network was trained at whole indices only. Latents are as the U-Net sees them:
the autoencoder's, times its scaling factor (0.18215 for SD 1.5, 0.13025 for SDXL).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratiograph.noising import ScaledLinearDDPM
from ratiograph.preconditioning import Preconditioned, Scalings

__all__ = ["EpsilonPrediction", "Prediction", "SamplePrediction", "StableDiffusion", "VelocityPrediction"]


class Prediction:
    """Base class: what the network's output F means."""

    def skip_and_out(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out), each [B], of mu = c_skip y + c_out F at the noise levels ``s`` [B]."""
        raise NotImplementedError


class EpsilonPrediction(Prediction):
    """F is the noise: mu = y - s F (Ho et al. 2020; SD 1.x and SDXL base)."""

    def skip_and_out(self, s):
        return torch.ones_like(s), -s


class VelocityPrediction(Prediction):
    """F is alpha' noise - sigma' x0: mu = alpha' x' - sigma' F (Salimans & Ho 2022; SD 2.x at 768)."""

    def skip_and_out(self, s):
        variance = 1 / (s.square() + 1)
        return variance, -s * variance.sqrt()


class SamplePrediction(Prediction):
    """F is x0 itself: mu = F."""

    def skip_and_out(self, s):
        return torch.zeros_like(s), torch.ones_like(s)


class StableDiffusion(Preconditioned):
    """mu = c_skip y + c_out F(x', index) under any noising process, from a U-Net trained on ``ScaledLinearDDPM``.

    Noise beyond the process's last index, s > 14.6, is clamped to that index: sample from s = 14.6 downwards.

    Args:
        network: ``SD15UNet``, ``SDXLUNet`` or ``UNetFromFolder``.
        prediction: what the network predicts; the noise by default.
        process: the process that the network was trained on; Stable Diffusion's 1000 steps by default.
        weights: U-Net in diffusers' naming, a ``.safetensors`` file or a folder with ``unet/`` in it; None starts from
            random weights.
        sigma_data: standard deviation of the latents, for EDM's training weight.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        prediction: Prediction | None = None,
        process: ScaledLinearDDPM | None = None,
        weights: str | None = None,
        sigma_data: float = 1.0,
    ):
        super().__init__(network=network, sigma_data=sigma_data, weights=weights)
        self.prediction = EpsilonPrediction() if prediction is None else prediction
        self.process = ScaledLinearDDPM() if process is None else process

    def load(self) -> None:
        if self.weights is not None:
            self.network.load(self.weights)

    def scalings(self, s: Tensor) -> Scalings:
        skip, out = self.prediction.skip_and_out(s)
        return Scalings(skip, out, (s.square() + 1).rsqrt(), self.process.time_of(s))
