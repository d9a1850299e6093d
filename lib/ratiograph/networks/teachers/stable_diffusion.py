"""Stable Diffusion as a denoiser of latents, for teacher, student score and one-step student.

Notation: s = sigma / alpha. The native view of a noisy latent is the variance-preserving one, x' = alpha' x0 + sigma'
noise, the same sample scaled to alpha'^2 + sigma'^2 = 1, at the step index whose sigma / alpha is nearest to s, as the
network was trained at whole indices only; F is the network's output. Latents are as the U-Net sees them: the
autoencoder's, times its scaling factor (0.18215 for SD 1.5, 0.13025 for SDXL).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ratiograph.algebra.noising import ScaledLinearDDPM
from ratiograph.core.domains import Scale
from ratiograph.core.files import sampled_digest
from ratiograph.core.types import Condition, Encoding, Noisy, expand
from ratiograph.networks.denoisers import EDM, autocast
from ratiograph.networks.teachers.scheduler_facts import (
    EpsilonPrediction,
    Prediction,
    SamplePrediction,
    VPrediction,
    check_network,
    facts_of,
)
from ratiograph.networks.weights.encoder_files import model_facts

__all__ = ["EpsilonPrediction", "Prediction", "SamplePrediction", "StableDiffusion", "VPrediction"]

SAME_LEVEL = 1e-4  # relative difference in s by rounding alone; neighbouring indices are 4e-3 apart or more


class StableDiffusion(EDM):
    """mu from F(x', index) under any noising process, by a U-Net that was trained on ``ScaledLinearDDPM``.

    Noise beyond the process's last index, s > 14.6, is clamped to that index: sample from s = 14.6 downwards.
    At the indices themselves the arithmetic is that of diffusers' ``DDIMScheduler`` in float32, to the bit on a CPU.

    Args:
        network: ``SD15UNet``, ``SDXLUNet``, ``UNetFromFolder``, or a ``LoRA`` of one.
        prediction: what the network predicts; None takes what the folder of ``weights`` says in its
            ``scheduler/scheduler_config.json``, the noise where there is none.
        process: the process that the network was trained on; None takes the folder's too, Stable Diffusion's 1000 steps
            where there is none.
        weights: a pipeline's folder in diffusers' format, its ``unet`` folder, a ``.safetensors`` file of either or of
            the whole model in its authors' naming, or ``hf://OWNER/NAME``; None starts from random weights.
        sigma_data: standard deviation of the latents, for EDM's training weight.
        compiled: whether the network's blocks are compiled by torch when they first run, see `compilation`.

    Raises:
        ValueError: ``prediction``, ``process`` or ``network`` is another than the folder of ``weights`` says.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        prediction: Prediction | None = None,
        process: ScaledLinearDDPM | None = None,
        weights: str | None = None,
        sigma_data: Scale = 1.0,
        compiled: bool = False,
    ):
        super().__init__(network=network, sigma_data=sigma_data, weights=weights, compiled=compiled)
        check_network(network, weights)
        self.prediction, self.process = facts_of(weights, prediction, process)
        beta = _single_precision_beta(self.process)
        # diffusers' arithmetic, float32 throughout: up to 5e-7 and 1.3e-5 from the exact scales, which mu shows where
        # alpha is small.
        product = (1 - beta).cumprod(0)
        self.register_buffer("native_beta", beta, persistent=False)
        self.register_buffer("native_alpha", product.sqrt(), persistent=False)
        self.register_buffer("native_sigma", (1 - product).sqrt(), persistent=False)

    @staticmethod
    def locate(*, weights: str | None, network: type) -> None:
        """Looks for the files that ``load`` will read, without reading them; those of the hub are fetched.

        Args:
            weights: as of the constructor.
            network: the class of its network.

        Raises:
            FileNotFoundError, ValueError: there are none; says how to get them.
        """
        if weights is not None:
            network.find(weights)

    def load(self) -> None:
        """Loads the weights; draws random ones if ``weights`` is None.

        Raises:
            FileNotFoundError, ValueError: there are none, or others than the network's; says how to get them.
        """
        if self.weights is None:
            self.network.draw()
        else:
            self.network.load(self.weights)

    def encoder_facts(self) -> dict[str, object]:
        """As of `contracts.Encoded`: those of the model that ``weights`` are part of."""
        return {} if self.weights is None else model_facts(self.weights)

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return self.network_facts() | (
            {} if self.weights is None else {f"weights {self.weights}": sampled_digest(self.network.find(self.weights))}
        )

    def network_facts(self) -> dict[str, str]:
        return {"prediction": self.prediction.name, "process": str(self.process)}

    def native(self, noisy: Noisy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x' [B, ...], index [B], alpha' [B, 1, ...], sigma' [B, 1, ...]) of a noisy sample."""
        alpha, sigma = noisy.alpha, noisy.sigma
        index = self.process.time_of(sigma / alpha)
        table_alpha, table_sigma = (table[index.long()].to(alpha) for table in (self.native_alpha, self.native_sigma))
        on_index = (sigma * table_alpha / (alpha * table_sigma) - 1).abs() < SAME_LEVEL
        scale = (alpha.square() + sigma.square()).rsqrt()
        scale = torch.where((scale - 1).abs() < SAME_LEVEL, torch.ones_like(scale), scale)
        alpha = torch.where(on_index, table_alpha, scale * alpha)
        sigma = torch.where(on_index, table_sigma, scale * sigma)
        x = noisy.x_t
        return expand(scale, x) * x, index, expand(alpha, x), expand(sigma, x)

    def encode(self, noisy: Noisy, condition: Condition) -> Encoding:
        x, index, alpha, sigma = self.native(noisy)
        with autocast(x.device, self.autocast_dtype):
            encoding = self.network.encode(x, index, condition)
        return replace(encoding, restore=lambda out: self.prediction.denoised(x, out.to(x.dtype), alpha, sigma))


def _single_precision_beta(process: ScaledLinearDDPM) -> Tensor:
    """beta [steps] of the process in float32, computed as diffusers does; on the CPU even under the meta device."""
    ends = (process.beta_start**0.5, process.beta_end**0.5)
    return torch.linspace(*ends, process.steps, dtype=torch.float32, device="cpu").square()
