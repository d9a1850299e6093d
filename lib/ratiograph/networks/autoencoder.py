"""Stable Diffusion's autoencoder, between images and latents (Rombach et al. 2022).

Notation: images [B, 3, H, W] in [-1, 1]; latents [B, C, h, w], h = H/8, in the U-Net's scale: the posterior's mean or a
sample of it, times the scaling factor (0.18215 for SD 1.5, 0.13025 for SDXL). diffusers is imported when an
`Autoencoder` is built.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ratiograph.core.domains import Positive, PositiveInt
from ratiograph.core.files import Missing, sampled_digest
from ratiograph.networks.checkpointing import directly, recomputed
from ratiograph.networks.weights.encoder_files import autoencoder_config, autoencoder_facts
from ratiograph.networks.weights.frozen import save_only
from ratiograph.networks.weights.pipeline_files import fit, folder_of, missing_package, read_part, weights_of

__all__ = ["Autoencoder"]

PART = "vae"
FOREIGN = ("shift_factor", "latents_mean", "latents_std")


class Autoencoder(nn.Module):
    """diffusers' ``AutoencoderKL``, frozen, not in checkpoints, and always in float32: SDXL's overflows in float16.

    Args:
        weights: a pipeline's folder in diffusers' format, its ``vae`` folder, a ``.safetensors`` file of either or of
            the whole model in its authors' naming, or ``hf://OWNER/NAME``; None keeps random weights. The architecture
            is that of the ``config.json`` there, and Stable Diffusion's own, 83,653,863 parameters, without one.
        scaling_factor: of the latents; None takes the configuration's, without one 0.18215, and SDXL's in a file of a
            whole SDXL model.
        chunk: samples encoded or decoded at a time, at least 1.
        checkpointing: where gradients are needed, keep only the latents of each chunk and decode it again in the
            backward pass; without it the activations, about 2 GB for each 512 x 512 sample, are all kept.
        double_backward: compute attention in a form that can be differentiated twice (`RewardTiltedSecondOrder`);
            keeps whole attention maps in memory.

    Raises:
        ValueError: diffusers is not installed, or the configuration is of another kind of autoencoder.
    """

    def __init__(
        self,
        *,
        weights: str | None,
        scaling_factor: Positive | None = None,
        chunk: PositiveInt = 4,
        checkpointing: bool = True,
        double_backward: bool = False,
    ):
        super().__init__()
        if chunk < 1:
            raise ValueError(f"Autoencoder.chunk={chunk} must be at least 1")
        self.weights, self.scaling_factor, self.chunk = weights, scaling_factor, chunk
        self.checkpointing, self.double_backward = checkpointing, double_backward
        self._build(autoencoder_config(weights))
        save_only(self)

    def _build(self, config: dict[str, object]) -> None:
        foreign = [name for name in FOREIGN if config.get(name) is not None]
        if foreign:
            raise ValueError(f"Autoencoder.weights={self.weights!r} is not Stable Diffusion's: it has {foreign[0]}")
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        except ImportError as error:
            raise missing_package("diffusers", "Autoencoder") from error
        self.config = {name: value for name, value in config.items() if not name.startswith("_")}
        self.vae = AutoencoderKL(**self.config).requires_grad_(False).eval()
        if self.double_backward:
            from diffusers.models.attention_processor import AttnProcessor

            self.vae.set_attn_processor(AttnProcessor())

    @property
    def factor(self) -> float:
        """The scaling factor of the latents."""
        return self.vae.config.scaling_factor if self.scaling_factor is None else self.scaling_factor

    @property
    def downsampling(self) -> int:
        """Image pixels along the side of one latent, 8."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @staticmethod
    def locate(*, weights: str | None) -> list[Path]:
        """The files that ``load`` will read, without reading them; those of the hub are fetched.

        Raises:
            FileNotFoundError, ValueError: there are none; says how to get them.
        """
        if weights is None:
            return []
        folder = folder_of(weights, PART, "Autoencoder.weights")
        files = weights_of(folder)
        if not files:
            raise Missing(
                weights,
                f"no autoencoder at Autoencoder.weights={weights!r}: {folder} holds no safetensors file; fetch it "
                f"with `hf download OWNER/NAME --include '{PART}/*' --local-dir FOLDER` (0.3 GB)",
            )
        return files

    def load(self) -> None:
        """Reads the weights. Never called in a dry run.

        Raises:
            FileNotFoundError, ValueError: there are none, or they do not fit; says how to get them.
        """
        files = self.locate(weights=self.weights)
        if not files:
            return
        config = autoencoder_config(self.weights)
        if {k: v for k, v in config.items() if not k.startswith("_")} != self.config:
            self._build(config)  # a model of the hub, whose configuration came with the weights
        fit("Autoencoder", self.vae.state_dict(keep_vars=True), read_part(files, PART, self.config), str(files[0]))

    def file_facts(self) -> dict[str, object]:
        """As of `contracts.Identified`."""
        return {f"weights {self.weights}": sampled_digest(self.locate(weights=self.weights))} if self.weights else {}

    def encoder_facts(self) -> dict[str, object]:
        """As of `contracts.Encoded`."""
        files = [] if self.weights is None else self.locate(weights=self.weights)
        found = autoencoder_facts(files, autoencoder_config(self.weights)) if files else {}
        return found and found | {"scaling_factor": self.factor}

    def train(self, mode: bool = True) -> Autoencoder:
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, C, h, w] of ``images`` [B, 3, H, W] in [-1, 1]: the posterior's mean; with a generator, a sample.

        Raises:
            ValueError: H or W is not a multiple of 8.
        """
        if any(side % self.downsampling for side in images.shape[2:]):
            raise ValueError(
                f"Autoencoder: images have {list(images.shape[2:])} pixels, and both sides must be multiples of "
                f"{self.downsampling}: crop or resize them"
            )
        with torch.autocast(images.device.type, enabled=False):
            posteriors = [self.vae.encode(part.float()).latent_dist for part in images.split(self.chunk)]
        mean = torch.cat([posterior.mean for posterior in posteriors])
        if generator is None:
            return self.factor * mean
        std = torch.cat([posterior.std for posterior in posteriors])
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        return self.factor * (mean + std * noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], mostly in [-1, 1], of ``latents`` [B, C, h, w]; differentiable, in float32."""
        run = recomputed if self.checkpointing and latents.requires_grad else directly
        return torch.cat([run(self._decode, part) for part in latents.split(self.chunk)])

    def _decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.to(self.vae.dtype) / self.factor).sample
