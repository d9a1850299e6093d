"""Teacher training by denoising score matching.

Loss (EDM Eq. 2, 8): E[ lambda(s) |mu(x_t) - x0|^2 ], lambda(s) = (s^2 + sigma_data^2) / (s sigma_data)^2 at
s = sigma / alpha, which gives every noise level the same weight at initialisation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratiograph.algebra.denoising_weights import EDMWeight, weighted_denoising_loss
from ratiograph.algebra.noising import NoisingProcess
from ratiograph.algebra.times import TimeSampler
from ratiograph.core.randomness import normal
from ratiograph.core.types import Batch, Condition, NoisySamples
from ratiograph.networks.augmentation import Augmentation, NoAugmentation
from ratiograph.networks.denoisers import EDM
from ratiograph.networks.samplers import ManyStepSampler
from ratiograph.training.experiment import Task
from ratiograph.training.optim import EMA, Adam

__all__ = ["DenoiserTraining"]


class DenoiserTraining(Task):
    """Trains a teacher on real samples.

    Args:
        denoiser: the network to train.
        noising: forward process.
        times: p(t) of the loss.
        optimizer: recipe of the optimiser.
        ema: recipe of the average, which is the resulting teacher.
        sampler: many-step sampler of the previews.
        augmentation: of the images; none by default.
    """

    accumulates = shardable = True

    def __init__(
        self,
        *,
        denoiser: EDM,
        noising: NoisingProcess,
        times: TimeSampler,
        optimizer: Adam,
        ema: EMA,
        sampler: ManyStepSampler,
        augmentation: Augmentation | None = None,
    ):
        super().__init__()
        self.denoiser, self.noising, self.times = denoiser, noising, times
        self.optimizer, self.ema, self.sampler = optimizer, ema, sampler
        self.augmentation = NoAugmentation() if augmentation is None else augmentation
        self.augmentation.check(denoiser.network)
        self.weight = EDMWeight(sigma_data=denoiser.sigma_data)

    def load(self) -> None:
        self.denoiser.load()

    def prepare(self, device: torch.device, autocast_dtype: torch.dtype | None) -> None:
        self.load()
        self.average = self.parallel.copy(self.denoiser)
        self.parallel.place(self, [self.denoiser, self.average], device, autocast_dtype)
        self.optimizers = {"denoiser": self.optimizer.build(self.denoiser.parameters())}
        self.denoiser.train()

    def trained(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "denoiser_average": self.average}

    def weights(self) -> dict[str, nn.Module]:
        return {"teacher": self.average}

    def step(self, batch: Batch, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        images, condition = self.augmentation.apply(batch.images, batch.condition, generator)
        t = self.times(self.noising, batch_size, generator)
        noisy = self.noising.add_noise(images, t, normal(images.shape, generator, images.dtype))
        pieces = NoisySamples(noisy, images, condition).split(self.accumulation)
        loss = torch.stack([self._learn(piece) for piece in pieces]).sum()
        updater = self.optimizers["denoiser"]
        norm = updater.step()
        self.ema.update(self.average, self.denoiser, batch_size, updater.updates * batch_size)
        return {"loss/denoising": loss, "gradient/denoiser": norm}

    def _learn(self, samples: NoisySamples) -> Tensor:
        """Backward of one micro-batch; returns its part of the loss [], detached."""
        denoised = self.denoiser.denoise(samples.noisy, samples.condition)
        loss = weighted_denoising_loss(denoised, samples.x0, samples.noisy, self.weight) / self.accumulation
        loss.backward()
        return loss.detach()

    def preview(self, samples: int, generator: torch.Generator) -> Tensor:
        network = self.average.network
        shape = (samples, network.image_channels, network.resolution, network.resolution)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        labels = torch.arange(samples, device=noise.device) % network.classes if network.classes else None
        return self.sampler.sample(self.average, noise, Condition(labels))
